"""Dense models made sparse, several made one, and sparse models made dense; each a function from models to a new model.

``upcycle.py`` makes experts of one model, ``mix.py`` of several, ``densify.py`` goes back, ``measure.py`` says how far apart
two models are.
"""

from moesaic.upcycle.config import PRESERVING, UpcycleConfig
from moesaic.upcycle.densify import DensifyConfig, densify
from moesaic.upcycle.measure import Difference, difference, random_ids
from moesaic.upcycle.mix import assemble
from moesaic.upcycle.upcycle import upcycle

__all__ = [
    "PRESERVING",
    "DensifyConfig",
    "Difference",
    "UpcycleConfig",
    "assemble",
    "densify",
    "difference",
    "random_ids",
    "upcycle",
]
