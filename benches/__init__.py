"""Benchmarks: the adapted layer, the training step, memory and the scheduler; ``python -m benches``."""
