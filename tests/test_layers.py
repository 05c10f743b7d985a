"""Imports point only down: a folder of src/moesaic may import itself and folders of a lower level, nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "moesaic"

# A new file or folder directly under moesaic must be given a level here, on purpose. Equal levels may not import each
# other. errors lies under everything; the four at the top only ever look down at the rest.
LEVELS = {
    "errors": -1,
    **dict.fromkeys(["config", "layout", "terminal", "tokenizer", "plan", "ops"], 0),
    **dict.fromkeys(["nn", "routing", "data"], 1),
    "experts": 2,
    "models": 3,
    **dict.fromkeys(["checkpoint", "parallel", "cost", "infer"], 4),
    **dict.fromkeys(["train", "compress", "lens", "convert"], 5),
    **dict.fromkeys(["audit", "report", "serve", "upcycle"], 6),
    **dict.fromkeys(["twins", "settings"], 7),
    **dict.fromkeys(["quickstart", "compare", "profile", "integrations"], 8),
    "__init__": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}


def unit_of(path: Path, package: Path) -> str:
    """The name directly under the package: a folder, or a file without its suffix."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def units(package: Path) -> set[str]:
    """Every folder holding Python and every Python file directly under the package."""
    return {unit_of(path, package) for path in package.rglob("*.py")}


def imports_of(path: Path, package: Path) -> list[tuple[int, str]]:
    """(line, unit) for every import of the package in a file, wherever in the file it stands."""
    found = []
    name, known = package.name, units(package)
    here = [name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            targets = [".".join([*base, *([node.module] if node.module else [])])]
            if targets == [
                name
            ]:  # `from moesaic import plan` names a unit; `from moesaic import MoE` what __init__ offers
                targets = [f"{name}.{alias.name if alias.name in known else '__init__'}" for alias in node.names]
        found += [
            (node.lineno, (target.split(".") + ["__init__"])[1]) for target in targets if target.split(".")[0] == name
        ]
    return found


def violations(package: Path, levels: dict[str, int]) -> list[str]:
    """One sentence per import that points up or sideways, and per file or folder without a level."""
    problems = [
        f"src/{package.name}/{unit} has no level; give it one in LEVELS of tests/test_layers.py."
        for unit in sorted(units(package) - levels.keys())
    ]
    for path in sorted(package.rglob("*.py")):
        unit = unit_of(path, package)
        for line, target in imports_of(path, package):
            if unit == target or unit not in levels or target not in levels:
                continue
            if levels[target] >= levels[unit]:
                direction = "sideways" if levels[target] == levels[unit] else "up"
                problems.append(
                    f"{path.relative_to(package.parent)}:{line}: {unit} (level {levels[unit]}) imports {direction} "
                    f"from {target} (level {levels[target]}); move what is shared to a lower level."
                )
    return problems


def test_imports_point_down() -> None:
    problems = violations(PACKAGE, LEVELS)
    assert not problems, "\n" + "\n".join(problems)


def test_the_package_is_read() -> None:
    """Guards the test above against reading an empty folder."""
    read = {target for path in PACKAGE.rglob("*.py") for _, target in imports_of(path, PACKAGE)}
    assert {"errors", "config"} <= units(PACKAGE)
    assert "errors" in read


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("plan/plan.py", "from moesaic.train.loop import train", "imports up from train (level 5)"),
        ("plan/plan.py", "import moesaic.train.loop", "imports up from train (level 5)"),
        ("plan/plan.py", "from moesaic import train", "imports up from train (level 5)"),
        ("plan/plan.py", "from ..train import loop", "imports up from train (level 5)"),
        ("plan/plan.py", "from .. import train", "imports up from train (level 5)"),
        ("plan/plan.py", "def f():\n    from moesaic.train import loop", "plan.py:2: plan (level 0) imports up"),
        ("plan/plan.py", "if TYPE_CHECKING:\n    from moesaic.train import loop", "imports up from train"),
        ("plan/plan.py", "import moesaic", "imports up from __init__"),
        ("plan/plan.py", "from moesaic import MoE", "imports up from __init__"),
        ("nn/norm.py", "from moesaic.routing import topk", "imports sideways from routing (level 1)"),
        ("serving/api.py", "", "src/moesaic/serving has no level"),
        ("extra.py", "", "src/moesaic/extra has no level"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    package = tmp_path / "moesaic"
    for name, text in {"__init__.py": "", "train/loop.py": "", "routing/topk.py": "", file: source}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    problems = violations(package, LEVELS)
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_imports_that_point_down_pass(tmp_path: Path) -> None:
    package = tmp_path / "moesaic"
    sources = {
        "plan/plan.py": "import torch\nfrom moesaic.errors import ConfigError",
        "plan/edit.py": "from moesaic.plan.plan import RoutingPlan\nfrom . import plan",
        "train/loop.py": "from moesaic import plan, errors\nimport moesaic.plan.edit",
        "errors.py": "import moesaic_other",
    }
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert violations(package, LEVELS) == []
