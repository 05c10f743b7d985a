"""transformers knows our folders after ``import moesaic``, in either order, and is not imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.integrations.folders import saved_folder

LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model).__name__ == "MoesaicForCausalLM", type(model)
assert transformers.AutoConfig.from_pretrained({folder!r}).hidden_size == 16
assert transformers.AutoTokenizer.from_pretrained({folder!r}).eos_token == "<|endoftext|>"
"""
# What each order does before the folder is loaded. Some import parts of transformers that import the Auto classes half-way.
ORDERS = {
    "moesaic first": "install(); import transformers",
    "transformers first": "import transformers; install()",
    "the Auto classes first": "from transformers import AutoModelForCausalLM, AutoTokenizer; import transformers; install()",
    "the config class first": "import transformers; transformers.AutoConfig; install()",
    "modeling utilities": "install(); import transformers.modeling_utils; import transformers",
    "generation": "install(); import transformers.generation.utils; import transformers",
    "the Trainer": "install(); from transformers import Trainer; import transformers",
    "tokenizers": "install(); from transformers import AutoTokenizer; import transformers",
    "twice": "install(); install(); import transformers; transformers.AutoModelForCausalLM; install()",
    "our model first": "import moesaic.integrations.hf_model; install(); import transformers",
    "reload": "install(); import transformers, importlib; importlib.reload(sys.modules['moesaic.integrations.hook']).install()",
}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_folder(tmp_path_factory.mktemp("hook") / "m")[1]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_of_imports(order: str, folder: Path) -> None:
    run("import sys; from moesaic.integrations.hook import install\n" + order + LOAD.format(folder=str(folder)))


def test_importing_moesaic_is_enough_and_imports_no_transformers(folder: Path) -> None:
    run(
        "import sys, moesaic\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('transformers', 'peft', 'lm_eval')]\n"
        "import transformers" + LOAD.format(folder=str(folder))
    )


def test_other_imports_go_on_as_they_were() -> None:
    run(
        "import sys, importlib, pickle, inspect\n"
        "from moesaic.integrations.hook import install\n"
        "before = [type(f).__name__ for f in sys.meta_path]\n"
        "install(); install()\n"
        "assert [type(f).__name__ for f in sys.meta_path] == before and before.count('_Finder') == 1\n"
        "import json.tool, transformers.models.auto.configuration_auto as auto\n"
        "assert type(auto.__spec__.loader).__name__ == type(auto.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert 'CONFIG_MAPPING' in inspect.getsource(auto)\n"
        "auto = importlib.reload(auto)\n"
        "assert 'moesaic' in auto.CONFIG_MAPPING\n"
        "assert importlib.util.find_spec('no_such_module') is None\n"
        "from transformers import AutoConfig\n"
        "from moesaic.integrations.hf_config import MoesaicConfig\n"
        "assert type(pickle.loads(pickle.dumps(MoesaicConfig()))) is MoesaicConfig\n"
    )
