"""A moesaic model as a Hugging Face one, for tools that know only those: ``generate``, Trainer, PEFT, lm-eval.

>>> import moesaic                                        # registers it with transformers, whichever is imported first
>>> model = AutoModelForCausalLM.from_pretrained("my-model")     # a model directory of ours
>>> model.save_pretrained("elsewhere")                    # again a model directory: moesaic.load("elsewhere")

The decoder is ``model.model``; everything moesaic does with a decoder works on it. Legend: B batch, S positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from moesaic.data.packing import IGNORE
from moesaic.errors import ConfigError
from moesaic.integrations.hf_cache import MoesaicCache
from moesaic.integrations.hf_config import MoesaicConfig
from moesaic.integrations.hf_files import generation_config
from moesaic.integrations.hf_folders import OnFolders
from moesaic.integrations.hf_inputs import facts_of, task_facts, valid_tokens
from moesaic.integrations.hf_loss import balancing_losses, mean_over_targets, targets_of, token_losses
from moesaic.integrations.hf_output import MoesaicOutput
from moesaic.models.build import build_model
from moesaic.models.decoder import Decoder
from moesaic.train.recompute import keep_activations, recompute_activations


class MoesaicForCausalLM(OnFolders, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model around a ``Decoder``.

    Args:
        config: the shape; without ``decoder`` one is built and initialised from it.
        decoder: a ready decoder (``MoesaicForCausalLM.of`` makes the config as well).

    Attributes:
        model: the decoder.
        balance: whether training adds the balancing losses the config names to the loss.
        training_step: number of the optimiser step, for losses that fade in; None is long after the start
            (``hf_trainer.MoesaicCallback`` sets it).
    """

    config_class = MoesaicConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "DepthBlock"]  # noqa: RUF012 (transformers' own, as below)
    _tied_weights_keys: dict[str, str] = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _is_stateful = True  # routers may remember: a cache cannot be cropped

    def __init__(self, config: MoesaicConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        if decoder is None:
            # Built in fp32, whatever default dtype the caller has set: cast afterwards, routers stay as they are.
            wanted = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                decoder = build_model(config.shape)
            finally:
                torch.set_default_dtype(wanted)
            decoder.source = config.source
            decoder.to(wanted)
        self.model = decoder
        self.balance = True
        self.training_step: int | None = None
        self._recomputes = False
        self.post_init()

    @classmethod
    def of(cls, decoder: Decoder) -> MoesaicForCausalLM:
        """Around a decoder, whose parameters it shares."""
        model = cls(MoesaicConfig(model=decoder.config, source=decoder.source), decoder)
        model.generation_config = generation_config(decoder)
        return model.train(decoder.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoesaicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        task_ids: Tensor | None = None,
        balance: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoesaicOutput | tuple[Any, ...]:
        """One forward, with Hugging Face's arguments.

        Args:
            input_ids: int64 (B, S). attention_mask: (B, S), or (B, past + S) with a cache; 0 on padding, left or right.
            position_ids: only a check where they count the tokens that are not padding; where they begin again at 0 inside a
                row, documents packed side by side, which then do not see each other. Models of transformers do so without a
                mask only if they keep no cache: at their default ``use_cache=True`` every token there sees all before it,
                other documents' included. Here what is packed reads the same either way, and no cache is made of it.
            labels: int64 (B, S), the tokens themselves; -100 is no target.
            use_cache: return a cache; as ``past_key_values`` only a ``MoesaicCache`` is taken.
            logits_to_keep: logits of the last so many positions alone (0: all), or of these.
            task_ids: int64 (B,), (B, 1) or (B, S), for routers that use a task or domain.
            balance: whether to add balancing losses; None follows ``self.balance``, in training with labels alone.

        Raises ``ConfigError`` for what a decoder cannot do: embeddings as input, masks per query, hidden states as output.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("A moesaic model reads token ids, not embeddings; pass input_ids.")
        extra = facts_of(kwargs)
        valid_BS = valid_tokens(input_ids, attention_mask, past_key_values)
        document_BS, task_BS = extra.documents(input_ids, position_ids, valid_BS, past_key_values), None
        if task_ids is not None:
            task_BS = task_facts(task_ids, input_ids)
        keeps_cache = use_cache if use_cache is not None else not self.training and labels is None
        if past_key_values is None and keeps_cache and document_BS is None:
            past_key_values = MoesaicCache()
        if past_key_values is not None and not isinstance(past_key_values, MoesaicCache):
            raise ConfigError(
                f"A moesaic model keeps a MoesaicCache, not a {type(past_key_values).__name__}; pass none."
            )
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        output = self.model(
            input_ids,
            valid_BS=valid_BS,
            document_BS=document_BS,
            task_BS=task_BS,
            cache=None if past_key_values is None else past_key_values.room_for(self.model, *input_ids.shape),
            last_only=last,
        )
        found: dict[str, Any] = {"logits": output.logits, "plans": output.plans, "depth": output.depth}
        found["past_key_values"] = past_key_values if keeps_cache else None
        targets_BS = extra.shift_labels
        if targets_BS is None and labels is not None:
            targets_BS = targets_of(labels)
        if targets_BS is not None:
            if valid_BS is not None:  # padding on the left would predict the first token
                targets_BS = targets_BS.masked_fill(~valid_BS, IGNORE)
            loss_BS = token_losses(output.logits, targets_BS)
            loss, share = mean_over_targets(loss_BS, targets_BS, extra.items)
            found |= {"lm_loss": loss.detach(), "token_losses": loss_BS.detach()}
            if (self.training and self.balance) if balance is None else balance:
                balancing = balancing_losses(self.model, output, loss_BS, self.training_step, task_BS)
                found["balance_loss"] = balancing.detach()
                loss = loss + share * balancing
            found["loss"] = loss
        elif not last and (not isinstance(logits_to_keep, int) or logits_to_keep):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            found["logits"] = output.logits[:, keep]
        made = MoesaicOutput(**found)
        return made.to_tuple() if return_dict is False else made

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding; a tied head follows at ``tie_weights``."""
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Refused: the head is a layer of our own."""
        raise ConfigError("The head of a moesaic model cannot be exchanged; set model.model.head.weight.")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Give the head the embedding's matrix, where the config says so."""
        if self.model.config.tie_embeddings:
            self.model.head.weight = self.model.embedding.weight

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused for another size: routers may have tables over the vocabulary, and the config is frozen."""
        size = self.model.config.vocab_size
        if new_num_tokens not in (None, size):
            raise ConfigError(
                f"A moesaic model keeps its vocabulary of {size}; it cannot be resized to {new_num_tokens}. Build one with "
                "vocab_size as large as you will need: ids the tokenizer does not name are never generated."
            )
        return self.model.embedding

    def init_weights(self) -> None:
        """Nothing: ``build_model`` has initialised, or a folder was read."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None: ...

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in backward, never the routing (``train/recompute.py``)."""
        self._recomputes = enable
        (recompute_activations if enable else keep_activations)(self.model)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self._recomputes

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same by its older name, which PEFT still asks for."""
        return self._recomputes

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_cache_length: int
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ConfigError(
                    f"cache_implementation={generation_config.cache_implementation!r} does not go with a moesaic model; "
                    "leave it out."
                )
            model_kwargs["past_key_values"] = MoesaicCache(min(max_cache_length, self.model.config.max_seq_len))
