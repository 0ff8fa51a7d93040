"""Generative replay: the teacher's samples on their way to the student, through a pool of shards or in the loop."""
