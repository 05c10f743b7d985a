"""Other people's checkpoints, in and out: one invertible table per family, accounted for to the last tensor and config key."""
