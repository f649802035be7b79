"""Measurements that the documentation quotes. Run from the root of the repository: ``python -m benchmarks.kernel``."""
