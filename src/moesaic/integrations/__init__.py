"""Other people's tools on moesaic's models: Hugging Face's Auto classes and Trainer, PEFT, lm-eval.

Nothing here is imported by ``import moesaic`` but ``hook.py``, which waits for ``transformers``.
"""
