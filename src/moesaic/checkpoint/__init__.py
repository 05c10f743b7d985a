"""Saving and loading: whole folders or none (``atomic``), tensors by name (``shards``), model folders (``native``)."""
