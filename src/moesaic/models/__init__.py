"""Models: config, blocks, the decoder, and the builder."""

from moesaic.models.build import build_model
from moesaic.models.config import DepthConfig, LatentConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.models.extract import extract_task_model
from moesaic.models.output import Output
from moesaic.models.twin import dense_twin

__all__ = [
    "Decoder",
    "DepthConfig",
    "LatentConfig",
    "MoEConfig",
    "ModelConfig",
    "Output",
    "RouterConfig",
    "build_model",
    "dense_twin",
    "extract_task_model",
]
