"""Benchmarks: the cases that tests and --mode=bench share, and what is timed."""
