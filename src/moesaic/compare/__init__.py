"""``moesaic compare``: train routers on the same tokens with the same active compute, and say what each does."""
