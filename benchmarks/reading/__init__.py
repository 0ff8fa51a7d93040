"""Parts of benchmarks/reader.py: making shards, reading them by hand, and the peer."""
