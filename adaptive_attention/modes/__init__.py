"""The modes of main.py: a file has the mode's name; its `run` does the work."""
