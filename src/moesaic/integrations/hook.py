"""``AutoModelForCausalLM.from_pretrained`` on a moesaic folder after ``import moesaic``, without importing transformers for it.

>>> install()        # once, when moesaic is imported; registers at once what transformers has loaded already

A finder at the front of ``sys.meta_path`` waits for three modules of transformers, hands every import on to the finders behind
it, and when one of the three has been executed, registers our class in that module's mapping. It answers for no other module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
# What our model class is made of: while one of these is being executed, we cannot be imported yet.
_NEEDED = ("transformers.modeling_utils", "transformers.generation.utils", "transformers.modeling_outputs")


def install() -> None:
    """Register our classes with transformers, now or whenever it is imported. Calling it again changes nothing."""
    if not any(getattr(finder, "waits_for_transformers", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register()


def _config(auto: ModuleType) -> None:
    from moesaic.integrations.hf_config import MoesaicConfig

    auto.CONFIG_MAPPING.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)


def _model(auto: ModuleType) -> None:
    from moesaic.integrations.hf_config import MoesaicConfig
    from moesaic.integrations.hf_model import MoesaicForCausalLM

    auto.AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)


def _tokenizer(auto: ModuleType) -> None:
    from moesaic.integrations.hf_config import MoesaicConfig
    from moesaic.integrations.hf_tokenizer import MoesaicTokenizerFast

    auto.AutoTokenizer.register(MoesaicConfig, fast_tokenizer_class=MoesaicTokenizerFast, exist_ok=True)


_ENTRIES: dict[str, Callable[[ModuleType], None]] = {
    f"{_AUTO}configuration_auto": _config,
    f"{_AUTO}modeling_auto": _model,
    f"{_AUTO}tokenization_auto": _tokenizer,
}
_WATCHED = {*_ENTRIES, *_NEEDED}


def _register(executed: str = "") -> None:
    """Enter our classes in those of the three modules that are complete; ``executed`` just became so."""
    if not all(_complete(name, executed) for name in _NEEDED if name in sys.modules):
        return  # its completion brings us here again
    for name, enter in _ENTRIES.items():
        if name in sys.modules and _complete(name, executed) and not getattr(sys.modules[name], "_moesaic", False):
            # Said first: what we import may import one of the watched modules, and so come here.
            sys.modules[name]._moesaic = True  # type: ignore[attr-defined]
            enter(sys.modules[name])


def _complete(name: str, executed: str) -> bool:
    spec = getattr(sys.modules[name], "__spec__", None)
    return name == executed or not getattr(spec, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the other finders find what is watched, and has their loader followed by us."""

    waits_for_transformers = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        for finder in sys.meta_path:
            if getattr(finder, "waits_for_transformers", False) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Followed(spec.loader)
                return spec
        return None


class _Followed(Loader):
    """A loader that does what ``inner`` does, puts it back in its place, and registers."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        module.__dict__.pop("_moesaic", None)  # a reload has emptied its mapping
        self.inner.exec_module(module)
        # Not by the names bound above: after a reload of this module, the newest code is the one to run.
        importlib.import_module(__name__)._register(module.__name__)
