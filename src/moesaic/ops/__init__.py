"""The few operations everything sparse is made of: group rows by expert, multiply them group by group, put them back."""

from moesaic.ops.grouped import grouped_mm, pick_backend
from moesaic.ops.permute import Grouping, combine_rows, gather_rows, group_rows

__all__ = ["Grouping", "combine_rows", "gather_rows", "group_rows", "grouped_mm", "pick_backend"]
