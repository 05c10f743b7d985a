"""Published decoder models as configs: every setting of the released ``config.json`` that a decoder here has.

>>> build_model(preset("deepseek-v3"), device="meta")        # 671 billion parameters, no memory
>>> replace(preset("mixtral-8x7b"), num_layers=2)            # the same, shallower

Sizes: the papers and model cards (their counts are in ``cost/published.py``). Other settings: the ``config.json`` of the
release named beside each, as the defaults of Hugging Face's transformers or public copies of the file show it; what was found
in neither is said. Losses are the coefficients of ``config.json``, of which some say little of how a model was trained.
"""

from __future__ import annotations

from collections.abc import Callable

from moesaic.errors import ConfigError, nearest
from moesaic.models.config import ModelConfig
from moesaic.models.presets import dense, sparse

PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "mixtral-8x7b": sparse.mixtral_8x7b,
    "mixtral-8x22b": sparse.mixtral_8x22b,
    "dbrx": sparse.dbrx,
    "deepseek-moe-16b": sparse.deepseek_moe_16b,
    "deepseek-v2": sparse.deepseek_v2,
    "deepseek-v2-lite": sparse.deepseek_v2_lite,
    "deepseek-v3": sparse.deepseek_v3,
    "qwen1.5-moe-a2.7b": sparse.qwen1_5_moe_a2_7b,
    "qwen2-57b-a14b": sparse.qwen2_57b_a14b,
    "qwen3-30b-a3b": sparse.qwen3_30b_a3b,
    "qwen3-235b-a22b": sparse.qwen3_235b_a22b,
    "olmoe-1b-7b": sparse.olmoe_1b_7b,
    "gpt-oss-120b": sparse.gpt_oss_120b,
    "gpt-oss-20b": sparse.gpt_oss_20b,
    "llama-3-8b": dense.llama_3_8b,
    "llama-3.1-8b": dense.llama_3_1_8b,
    "mistral-7b": dense.mistral_7b,
    "qwen3-0.6b": dense.qwen3_0_6b,
    "qwen3-8b": dense.qwen3_8b,
}


def preset(name: str) -> ModelConfig:
    """The config of a published model. Raises ``ConfigError`` naming the nearest one there is."""
    if name not in PRESETS:
        raise ConfigError(f'There is no preset "{name}".{nearest(name, PRESETS)} Known: {", ".join(PRESETS)}.')
    return PRESETS[name]()
