"""The README is kept true: its file tree is the package, its command table is the command line, its commands exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGE = ROOT / "src" / "moesaic"


def block_after(marker: str, text: str) -> str:
    """The fenced block that follows ``<!-- marker -->``; between them only blank lines may stand."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\s*\n```[^\n]*\n(.*?)\n```", text, re.DOTALL)
    assert found, f"README.md has no fenced block after <!-- {marker} -->"
    return found[1]


def tree_paths(block: str) -> dict[str, str]:
    """{path relative to src/moesaic: comment} from an indented tree, one file or folder a line, folders ending in /.

    The first line names the root (``src/moesaic/``). Children are indented deeper than their folder; the name ends at
    two spaces or at a ``#``. Drawing characters (``│ ├ └ ─``) count as indentation.
    """
    paths: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    lines = [line for line in re.sub("[│├└─]", " ", block).splitlines() if line.strip()]
    assert lines[0].split()[0].rstrip("/") == "src/moesaic", "the file tree starts with the line src/moesaic/"
    for line in lines[1:]:
        indent = len(line) - len(line.lstrip())
        name, _, comment = line.strip().partition(" ")
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = "".join(folder for _, folder in folders) + name
        assert path not in paths, f"the README's file tree names {path} twice"
        paths[path] = comment.strip().lstrip("#").strip()
        if name.endswith("/"):
            folders.append((indent, name))
    return paths


def package_paths(package: Path) -> set[str]:
    """Every file and folder of the package (folders ending in /), without caches and the folders' __init__.py."""
    paths = set()
    for path in package.rglob("*"):
        name = path.relative_to(package).as_posix()
        if "__pycache__" in path.parts or path.is_dir() or path.name == "py.typed":
            continue
        if path.name == "__init__.py" and path.parent != package:
            continue  # a folder's own line says what it is
        paths.add(name)
        paths.update(f"{parent.as_posix()}/" for parent in Path(name).parents if parent != Path())
    return paths


def commands_named(text: str) -> set[str]:
    """Every word that follows ``moesaic`` inside code: fenced blocks and inline back-ticks."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    # At the start of a line or after a prompt or shell joiner: not "src/moesaic is", not "import moesaic as".
    pattern = r"(?:^|[&|;$(]\s*|bin/|-m )moesaic[ \t]+([a-z][a-z0-9-]*)"
    return {word for code in [*fenced, *inline] for word in re.findall(pattern, code.strip(), re.MULTILINE)}


def command_table(text: str) -> dict[str, str]:
    """{command: what it does} from the README's table after ``<!-- command-table -->``, rows like | `train` | ... |."""
    found = re.search(r"<!-- command-table -->\s*\n((?:\|[^\n]*\n?)+)", text)
    assert found, "README.md has no table after <!-- command-table -->"
    rows = re.findall(r"^\|\s*`(?:moesaic )?([a-z][a-z0-9-]*)[^`|]*`\s*\|\s*([^|\n]*?)\s*\|", found[1], re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands() -> set[str]:
    cli = importlib.import_module("moesaic.cli")
    return set(cli.COMMANDS)


@pytest.fixture(scope="module")
def cli_help() -> str:
    command = [sys.executable, "-m", "moesaic", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    return done.stdout


def test_file_tree_is_the_package(readme: str) -> None:
    tree, package = tree_paths(block_after("file-tree", readme)), package_paths(PACKAGE)
    assert sorted(package - tree.keys()) == [], "files the README's tree does not name"
    assert sorted(tree.keys() - package) == [], "names in the README's tree that do not exist"


def test_every_line_of_the_file_tree_says_what_it_is(readme: str) -> None:
    assert [path for path, comment in tree_paths(block_after("file-tree", readme)).items() if not comment] == []


def test_every_command_named_exists(readme: str, commands: set[str]) -> None:
    named = commands_named(readme)
    assert named, "the README names no moesaic command"
    assert sorted(named - commands) == []


def test_command_table_is_the_command_line(readme: str, commands: set[str]) -> None:
    assert sorted(command_table(readme)) == sorted(commands)


def test_help_lists_every_command(cli_help: str, commands: set[str]) -> None:
    listed = set(re.findall(r"^\W*([a-z][a-z0-9-]*)\s", cli_help, re.MULTILINE))
    assert sorted(commands - listed) == []


def test_test_command_runs_pytest(readme: str) -> None:
    command = block_after("test-command", readme)
    assert "pytest" in command
    assert "-c constraints.txt" in command


def test_parts_of_this_test(tmp_path: Path) -> None:
    """The readers above on a small README and package written here."""
    text = (
        "Run `moesaic train x.json`, from src/moesaic in `import moesaic as mo`.\n<!-- file-tree -->\n```\n"
        "src/moesaic/\n├── cli.py  # the command line\n└── plan/  # the value\n    └── plan.py  # RoutingPlan\n```\n"
        "<!-- command-table -->\n| command | does |\n|---|---|\n| `train` | trains |\n| `eval DIR` | measures |\n"
        "```\npython3 -m venv .venv && .venv/bin/moesaic quickstart\nmoesaic eval d\n```\n"
    )
    assert tree_paths(block_after("file-tree", text)) == {
        "cli.py": "the command line",
        "plan/": "the value",
        "plan/plan.py": "RoutingPlan",
    }
    assert commands_named(text) == {"train", "quickstart", "eval"}
    assert command_table(text) == {"train": "trains", "eval": "measures"}
    for name, source in {"cli.py": "x", "plan/__init__.py": "", "plan/plan.py": "x", "plan/edit.py": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert package_paths(tmp_path) - tree_paths(block_after("file-tree", text)).keys() == {"plan/edit.py"}
