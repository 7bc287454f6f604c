"""Benchmarks: named cases and their timing. The tests use the cases too."""
