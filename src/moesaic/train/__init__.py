"""Training: optimiser, step, recomputation, validation, loop, log and snapshots."""
