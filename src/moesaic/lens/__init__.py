"""Look into a sparse model and intervene: record plans, edit them, run again."""

from moesaic.lens.intervene import Trace, edit, trace

__all__ = ["Trace", "edit", "trace"]
