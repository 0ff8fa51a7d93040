"""Data sets to task shards: `build` and `verify`."""
