"""Checkpoints of many ranks: saved under one layout, loaded under any other, made one file again."""
