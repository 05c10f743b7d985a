"""``from_pretrained``, ``save_pretrained`` and ``load_state_dict`` of a model whose checkpoint is a model directory of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from moesaic.checkpoint.native import config_differences
from moesaic.checkpoint.shards import MAX_SHARD_BYTES
from moesaic.config import to_dict
from moesaic.errors import CheckpointError, ConfigError
from moesaic.integrations import hf_files
from moesaic.integrations.expert_views import expert_views
from moesaic.integrations.hf_config import MoesaicConfig
from moesaic.models.build import build_model
from moesaic.models.decoder import Decoder

_GENERATION = "generation_config.json"


class OnFolders:
    """Put before ``PreTrainedModel``: its loader and writer, by ours."""

    base_model_prefix: str
    model: Decoder
    generation_config: Any
    state_dict: Any

    @classmethod
    def of(cls, decoder: Decoder) -> Any:
        """The model around a decoder."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: MoesaicConfig | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        subfolder: str = "",
        generation_config: GenerationConfig | None = None,
        output_loading_info: bool = False,
        verify: bool = True,
        balance: bool = True,
        expert_views: bool = False,
        **arguments: Any,
    ) -> Any:
        """The model of a model directory (a folder, or a repository on the hub), in evaluation mode.

        Args:
            dtype: None or "auto" keeps the saved dtypes; another one is what parameters become, routers excepted (fp32).
            device_map: one device; "auto" is the first GPU where there is one.
            verify: check every byte against the manifest.
            expert_views: offer every expert's matrices as linear layers (``integrations/expert_views.py``), for adapters.

        Raises ``CheckpointError`` for a tensor that is missing, unexpected or of another shape: none is ever initialised here.
        """
        hub = {name: arguments.pop(name) for name in hf_files.HUB if name in arguments}
        adapter = (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path")
        if adapter is not None:
            raise ConfigError(
                f"{adapter} holds an adapter; load it with moesaic.integrations.lora.load_lora(model, {str(adapter)!r})."
            )
        asked = getattr(config, "_attn_implementation", None)  # Auto classes put it there
        hf_files.check_arguments({**arguments, **({"attn_implementation": asked} if asked else {})})
        folder = hf_files.place_of(pretrained_model_name_or_path, subfolder, hub)
        device = hf_files.device_of(device_map)
        decoder = hf_files.read_folder(
            folder, hf_files.dtype_of(dtype if dtype is not None else torch_dtype), device, verify
        )
        if isinstance(config, MoesaicConfig):
            differences = config_differences(to_dict(decoder.config), to_dict(config.shape))
            if differences:
                raise CheckpointError(f"{folder} holds a model of another shape than asked for: {differences[0]}.")
        model = cls.of(decoder)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        model.config.dtype = model.dtype
        model.balance = balance
        if device_map is not None:
            model.hf_device_map = {"": device}
        if (folder / _GENERATION).exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if generation_config is not None:
            model.generation_config = generation_config
        if expert_views:
            _expert_views(model)
        model.eval()
        # Nothing can be missing: that was an error.
        nothing: dict[str, list[str]] = {
            "missing_keys": [],
            "unexpected_keys": [],
            "mismatched_keys": [],
            "error_msgs": [],
        }
        return (model, nothing) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = MAX_SHARD_BYTES,
        **kwargs: Any,
    ) -> None:
        """Write a model directory. The tokenizer is saved by itself, as always in Hugging Face: ``tokenizer.save_pretrained``.

        ``state_dict``: the whole model's, gathered from other processes. ``push_to_hub``: call ``push_to_hub`` instead.
        """
        if not kwargs.get("safe_serialization", True):
            raise ConfigError(
                "save_pretrained(safe_serialization=False) asks for pickles, which can run any code when they are opened; a "
                "moesaic model is saved as safetensors: leave it out."
            )
        if push_to_hub:
            raise ConfigError('save_pretrained(push_to_hub=True) is not offered; call model.push_to_hub("OWNER/NAME").')
        if not is_main_process:
            return
        prefix = f"{self.base_model_prefix}."
        tensors = {n.removeprefix(prefix): t for n, t in (state_dict or self.state_dict()).items()}
        strangers = sorted(set(tensors) ^ set(_shape_of(self.model)))
        if strangers:
            raise ConfigError(
                f"This model has or lacks tensors its config knows nothing of ({strangers[0]}); merge its adapters first "
                "(model = peft_model.merge_and_unload())."
            )
        generation = self.generation_config.to_json_string(use_diff=True).encode()
        hf_files.write_folder(
            Path(save_directory), hf_files.Stored(self.model, tensors), {_GENERATION: generation}, max_shard_size
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; the decoder's own names, as a model directory has them, are understood as well.

        A Trainer resumes with what the file holds, and passes over names it does not find.
        """
        prefix, head = f"{self.base_model_prefix}.", f"{self.base_model_prefix}.head.weight"
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict = {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}
        if self.model.config.tie_embeddings and head not in state_dict and f"{prefix}embedding.weight" in state_dict:
            state_dict = {**state_dict, head: state_dict[f"{prefix}embedding.weight"]}
        module: Any = super()
        return module.load_state_dict(state_dict, strict, assign)


_expert_views = expert_views  # from_pretrained has an argument of that name


def _shape_of(decoder: Decoder) -> dict[str, Tensor]:
    return build_model(decoder.config, seed=0, device="meta").state_dict()
