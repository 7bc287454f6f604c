"""The command line: what was typed becomes the arguments of a mode's `run`."""
