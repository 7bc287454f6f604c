"""Transformers whose attention heads learn what to look at."""

__version__ = "0.1.0"
