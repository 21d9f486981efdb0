"""Measurements that `scripts/benchmark.py` prints: ratios of medians from alternating runs in one process."""
