"""The experiments, one file each: what is run, and what it costs."""
