"""What a run is made of: batches, steps, optimizer, checkpoints, records."""
