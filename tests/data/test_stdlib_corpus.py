"""The corpus every machine has: deterministic, balanced, domains that share no text, whatever the installation lacks."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from moesaic.data.stdlib_corpus import Places, stdlib_corpus
from moesaic.errors import ConfigError, DataError

TABLE = "COLOURS = {\n" + "".join(f'    "colour {n}": "#{n * 7919:06x}",\n' for n in range(60)) + "}\n"
MODULE = '''"""The module's own text: {name} explains itself here at length, so that it counts as prose for the corpus."""

import os

{table}

class Thing:
    """Only a docstring for {name}."""


class Other(Exception):
    "A thing of {name}, described é." ; x = 1

    def method(self):
        r"""What the method of {name} does.

        Indented detail about it, a whole paragraph of it, so that there is something to read and to learn from.
        """
        for separator in (os.sep, os.altsep, os.pathsep):
            if separator is not None and separator.strip() == "{name}":
                return separator
        return os.sep  # code of {name} stays
'''


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A small installation with every domain."""
    places = Places(tmp_path / "lib", tmp_path / "include", tmp_path / "packages")
    files = {
        "lib/test/test_one.py": "def test_one():\n    assert 1 + 1 == 2\n" * 60,
        "lib/pkg/tests/deep.py": "def test_two():\n    assert 2 + 2 == 4\n" * 60,
        "lib/encodings/cp1.py": "decoding_table = (\n" + "    'x'  # 0x01\n" * 100 + ")\n",
        "lib/encodings/utf_1.py": "import codecs\n" * 100,
        "lib/pydoc_data/topics.py": f"topics = {{'if': {'The if statement. ' * 40!r}, 'for': {'The for loop. ' * 40!r}}}",
        "lib/page.html": "<head><style>hidden</style></head><p>Visible</p>\n<b>words</b> of help &amp; more.\n" * 30,
        "lib/latin.py": b"# caf\xe9\n" * 100,
        "lib/broken.py": "def f(:\n" * 100,
        "lib/_sysconfigdata_x.py": "build_time_vars = {}\n" * 100,
        "lib/site-packages/other.py": "not = 'ours'\n" * 100,
        "include/object.h": "typedef struct { int x; } object;\n" * 60,
        "packages/tool-1.0.dist-info/METADATA": "Name: tool\nVersion: 1\n\n" + "Tool is a tool for work. " * 40,
        "packages/tool-1.0.dist-info/LICENSE": "Permission is granted to everyone. " * 40,
        "packages/same-1.0.dist-info/LICENSE": "Permission is granted to everyone. " * 40,
    }
    for name in ("alpha", "beta", "gamma"):
        files[f"lib/{name}.py"] = MODULE.format(name=name, table=TABLE.replace("colour", name))
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return places


def texts(places: Places, label: str) -> str:
    corpus = stdlib_corpus(1_000_000, 0, places)
    return "\n".join(document.text for document in corpus.documents if document.label == label)


def test_every_domain_gets_its_own_text(places: Places) -> None:
    assert "assert 1 + 1" in texts(places, "tests")
    assert "assert 2 + 2" in texts(places, "tests")
    assert "typedef struct" in texts(places, "c headers")
    tables = texts(places, "data tables")
    assert "decoding_table" in tables
    assert '"alpha 59": ' in tables
    prose = texts(places, "prose")
    for words in ("The if statement", "Visible\nwords of help & more.", "Tool is a tool", "beta explains itself"):
        assert words in prose
    assert "hidden" not in prose
    assert "Version: 1" not in prose
    assert prose.count("Permission is granted") == 40  # the second copy of the licence is left out


def test_docstrings_and_tables_move_out_of_the_code(places: Places) -> None:
    code, prose = texts(places, "code"), texts(places, "prose")
    for name in ("alpha", "beta", "gamma"):
        assert f"# code of {name} stays" in code
        assert f"What the method of {name} does.\n\nIndented detail" in prose
        assert f"What the method of {name} does." not in code
        assert f"{name} explains itself" not in code
        assert f'"{name} 5"' not in code
        assert f"A thing of {name}, described é." in code  # it shares its line with a statement
    assert "class Thing:\n    pass\n" in code
    compile(code, "all modules after each other", "exec", flags=ast.PyCF_ONLY_AST)


def test_foreign_broken_and_private_files_are_left_out(places: Places) -> None:
    everything = "".join(document.text for document in stdlib_corpus(1_000_000, 0, places).documents)
    for words in ("caf\ufffd", "def f(:", "build_time_vars", "not = 'ours'"):
        assert words not in everything
    wheres = {document.where for document in stdlib_corpus(1_000_000, 0, places).documents}
    assert "stdlib/alpha.py" in wheres
    assert not any(str(places.stdlib.parent) in where for where in wheres)


@pytest.mark.parametrize("missing", ["lib/test", "lib/pkg", "include", "packages", "lib/pydoc_data", "lib/encodings"])
def test_what_an_installation_lacks_is_left_out(places: Places, missing: str) -> None:
    root = places.stdlib.parent
    (root / missing).rename(root / "gone")
    if missing.startswith("lib/"):
        (root / "gone").rename(root / "packages" / "gone")
    corpus = stdlib_corpus(1_000_000, 0, places)
    assert {"code", "prose", "data tables"} <= set(corpus.sizes)
    assert ("c headers" in corpus.sizes) == (missing != "include")


def test_nothing_to_read_is_an_error_in_words(tmp_path: Path) -> None:
    nowhere = Places(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with pytest.raises(DataError, match="too few text files of its own .*give a text file"):
        stdlib_corpus(100_000, 0, nowhere)
    with pytest.raises(ConfigError, match="max_bytes is 9999"):
        stdlib_corpus(9_999, 0)


def test_no_domain_is_more_than_half(places: Places) -> None:
    (places.stdlib / "test" / "huge.py").write_text("".join(f"x{n} = {n}\n" for n in range(50_000)))
    corpus = stdlib_corpus(10_000_000, 0, places)
    total = sum(size for _, size in corpus.sizes.values())
    assert max(size for _, size in corpus.sizes.values()) <= total / 2
    assert corpus.sizes["tests"][1] > 0.4 * total
    assert max(len(document.text.encode()) for document in corpus.documents) <= 32_768


def test_the_installation_at_hand_gives_a_balanced_reproducible_corpus() -> None:
    corpus = stdlib_corpus(200_000, 0)
    again = stdlib_corpus(200_000, 0)
    assert corpus == again
    other = stdlib_corpus(200_000, 1)
    assert other.fingerprint != corpus.fingerprint
    sizes = {label: size for label, (_, size) in corpus.sizes.items()}
    assert {"code", "prose", "data tables"} <= set(sizes)
    assert 150_000 < sum(sizes.values()) <= 200_000
    assert max(sizes.values()) <= sum(sizes.values()) / 2
    for label, (count, size) in corpus.sizes.items():
        own = [document.text for document in corpus.documents if document.label == label]
        assert (len(own), sum(len(text.encode()) for text in own)) == (count, size)
    everything = [document.text for document in corpus.documents]
    assert len(set(everything)) == len(everything)
    assert not any(sys.prefix in document.where for document in corpus.documents)


def test_the_table_of_domains(places: Places) -> None:
    corpus = stdlib_corpus(1_000_000, 0, places)
    lines = corpus.describe().splitlines()
    assert lines[0].split() == ["domain", "documents", "bytes", "share"]
    assert [line[:11].strip() for line in lines[1:]] == ["c headers", "code", "data tables", "prose", "tests"]
    assert f"{corpus.sizes['code'][1]:,}" in lines[2]
