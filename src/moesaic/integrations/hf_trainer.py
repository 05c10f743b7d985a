"""What Hugging Face's Trainer does not know of sparse models: what happens to routers after every optimiser step.

>>> Trainer(model=model, args=args, train_dataset=data, callbacks=[MoesaicCallback()]).train()

Without it a Trainer trains the weights, balancing losses included (they are part of the model's loss); but router biases that
follow load, capacities that adapt, and losses that fade in stay where they are. A model without them needs no callback.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.integrations.hf_output import MoesaicOutput
from moesaic.models.output import Output
from moesaic.train.reading import StepReading, take_reading, take_statistics
from moesaic.train.step import after_step, outcome_of


class MoesaicCallback(TrainerCallback):  # type: ignore[misc]
    """Reads load off every training forward and hands it to the routers after the step, as ``moesaic train`` does.

    On several processes each router follows its own process's load.
    """

    def __init__(self) -> None:
        self._hook: Any = None
        self._model: MoesaicForCausalLM | None = None
        self._reading = StepReading()
        self._last: MoesaicOutput | None = None
        self._loss = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Begin to watch the model's forwards."""
        self.on_train_end(args, state, control)
        inner = next((m for m in (model or nn.Identity()).modules() if isinstance(m, MoesaicForCausalLM)), None)
        self._model = inner
        if inner is not None:
            inner.training_step = state.global_step + 1
            self._hook = inner.register_forward_hook(self._watch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser has stepped: tell the routers what the step did."""
        model, last = self._model, self._last
        if model is None or last is None or last.plans is None or last.token_losses is None:
            return
        self._reading.lm_loss = self._loss
        after_step(model.model, self._reading)
        losses_T = last.token_losses.flatten()
        for layer, sparse in model.model.moe_layers().items():
            sparse.router.observe(last.plans[layer].detach(), outcome_of(last.plans, layer, losses_T))
        model.training_step = state.global_step + 1
        self._reading, self._last, self._loss = StepReading(), None, 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()
        if self._model is not None:
            self._model.training_step = None
        self._hook = self._model = self._last = None
        self._reading, self._loss = StepReading(), 0.0

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if (
            not module.training
            or not isinstance(output, MoesaicOutput)
            or output.token_losses is None
            or not output.plans
        ):
            return
        assert self._model is not None and output.logits is not None
        seen = Output(output.logits, output.plans, None, output.depth or {})
        take_reading(self._reading.layers, seen.plans)
        take_reading(self._reading.depth, seen.depth)
        take_statistics(self._reading, self._model.model, seen.plans)
        assert output.lm_loss is not None
        self._loss += float(output.lm_loss)
        self._last = output
