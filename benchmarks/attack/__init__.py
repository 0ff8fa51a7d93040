"""What `benchmarks/chaos.py` does to a run."""
