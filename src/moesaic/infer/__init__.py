"""Running a model: generation with a key-value cache, and the rules that pick the next token."""

from moesaic.infer.domains import DomainPosterior, domain_posterior
from moesaic.infer.generate import generate, generate_texts
from moesaic.infer.sampling import SamplingConfig, sample
from moesaic.infer.token_loop import Generation, generate_ids

__all__ = [
    "DomainPosterior",
    "Generation",
    "SamplingConfig",
    "domain_posterior",
    "generate",
    "generate_ids",
    "generate_texts",
    "sample",
]
