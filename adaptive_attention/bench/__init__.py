"""Benchmarks: the cases that tests share with them, and what is timed."""
