"""Measures of a generator that learns task after task: Frechet distance, class mix, accuracy, forgetting."""
