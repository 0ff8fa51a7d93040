"""What the speed benchmarks are made of: the contenders, and how they take turns on one device."""
