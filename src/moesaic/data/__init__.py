"""Text to tokens to batches: sources, the token store, the split, packing, the sampler."""
