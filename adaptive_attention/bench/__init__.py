"""Benchmarks: named cases, which the tests use too, and their timing."""
