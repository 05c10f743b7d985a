"""Training: text sources, token cache, packing, optimiser, step, loop, log and snapshots."""
