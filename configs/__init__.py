"""One file per experiment: the record of what was run, at what cost."""
