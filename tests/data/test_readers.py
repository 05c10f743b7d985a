"""Text sources: every kind is read, every fault is one sentence with its place, labels are as promised."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.data.readers import Document, read_documents
from moesaic.errors import ConfigError, DataError, MoesaicError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(source: Any, **options: Any) -> list[str]:
    return [document.text for document in read_documents(source, **options)]


def labels(source: Any, **options: Any) -> list[str]:
    return [document.label for document in read_documents(source, **options)]


def fails(match: str, source: Any, **options: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        list(read_documents(source, **options))
    assert "\n" not in str(caught.value)  # one sentence for one line of the terminal


# Kinds of sources


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.weird", "noname"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, "one\n\ntwo\n" * 5000)
    assert list(read_documents(str(file))) == [Document("one\n\ntwo\n" * 5000, name.split(".")[0], str(file))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, '{"text": "one", "n": 1}\n\n{"text": "two\\u0000"}')
    got = list(read_documents(file))
    assert [document.text for document in got] == ["one", "two\0"]
    assert [document.where for document in got] == [f"{file}:1", f"{file}:3"]


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "train-00000-of-00002.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "lang": ["en", "de"], "x": [1, 2]}), file)
    got = list(read_documents(str(file)))
    assert got == [Document("one", "train", f"{file}:row 1"), Document("two", "train", f"{file}:row 2")]
    assert labels(str(file), label_field="lang") == ["en", "de"]
    assert labels(str(file), label_field="x") == ["1", "2"]


def test_a_folder_is_read_recursively_in_sorted_order_without_binary_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.py", ".hidden/x.txt", ".y.txt", "z.bin"):
        write(tmp_path / name, name if not name.endswith("bin") else b"\xff\x00")
    assert texts(tmp_path) == ["a.txt", "b.txt", "sub/c.py"]


def test_a_readme_beside_data_files_is_not_text_of_the_corpus(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "about")
    assert texts(tmp_path) == ["about"]
    write(tmp_path / "data.jsonl", '{"text": "data"}')
    assert texts(tmp_path) == ["data"]


def test_globs_and_lists_join_without_reading_a_file_twice(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "x" / "b.txt", "b")
    assert texts(str(tmp_path / "**" / "*.txt")) == ["a", "b"]
    assert texts([str(b), str(tmp_path / "*.txt"), str(a)]) == ["b", "a"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    assert texts(str(write(tmp_path / "a[1].txt", "x"))) == ["x"]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    return module


def test_saved_datasets(tmp_path: Path, datasets: Any) -> None:
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "kind": ["x", "y"]})
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=one, test=one.select([1]))
    both.save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "one") == texts(tmp_path / "both") == ["a", "b"]
    assert texts(f"hf://{tmp_path / 'both'}:test") == ["b"]
    assert labels(tmp_path / "one") == ["one", "one"]
    assert labels(tmp_path / "one", label_field="kind") == ["x", "y"]
    fails(r'no field "txt" \(it has: "text", "kind"\). Did you mean "text"', tmp_path / "one", text_field="txt")
    fails(r'no split "valid" \(it has: train, test\)', f"hf://{tmp_path / 'both'}:valid")
    shard = next((tmp_path / "one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    fails("data set .*one cannot be loaded", tmp_path / "one")


def test_dataset_folders_go_through_load_dataset(tmp_path: Path, datasets: Any) -> None:
    write(tmp_path / "hub" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    source = f"hf://{tmp_path / 'hub'}"
    assert texts(source) == ["a", "b"]
    assert labels(source) == ["hub", "hub"]
    fails("cannot be loaded: Unknown split", source + ":nope")


def test_an_unreachable_hub_is_one_sentence(datasets: Any) -> None:
    fails("hub is out of reach", "hf://nobody/nothing-here")


def test_paragraphs_cut_a_file_at_blank_lines_and_lose_nothing(tmp_path: Path) -> None:
    whole = "".join(f"Paragraph {n}.\nSecond line.\n\n" for n in range(3000))
    file = write(tmp_path / "a.txt", whole)
    got = list(read_documents(file, document="paragraphs"))
    assert "".join(document.text for document in got) == whole
    assert len(got) > 5
    assert all(8192 <= len(document.text) < 8300 for document in got[:-1])
    line = int(got[1].where.rsplit(":", 1)[1])
    assert whole.splitlines()[line - 1] == got[1].text.splitlines()[0]


# Labels


def make(tmp_path: Path, *names: str) -> None:
    for name in names:
        write(tmp_path / name, "text")


def test_auto_labels_are_stems_for_files_of_one_folder(tmp_path: Path) -> None:
    make(tmp_path, "code.txt", "prose.v2.md", "logs.txt.gz")
    assert labels(tmp_path) == ["code", "logs", "prose.v2"]


def test_shards_share_a_label(tmp_path: Path) -> None:
    make(tmp_path, "en-00000-of-00002.txt", "en-00001-of-00002.txt", "de_1.txt")
    assert sorted(labels(tmp_path)) == ["de", "en", "en"]


def test_auto_labels_are_the_first_differing_folder(tmp_path: Path) -> None:
    make(tmp_path, "code/py/a.txt", "code/c/b.txt", "prose/a.txt", "top.txt")
    assert labels(tmp_path) == [tmp_path.name, "code", "code", "prose"]
    assert labels([tmp_path / "code", tmp_path / "prose"]) == ["code", "code", "prose"]


def test_many_files_of_one_folder_are_one_label(tmp_path: Path) -> None:
    make(tmp_path, *(f"page{n}x.txt" for n in range(65)))
    assert set(labels(tmp_path)) == {tmp_path.name}


def test_files_named_one_by_one_are_stems_unless_equal(tmp_path: Path) -> None:
    make(tmp_path, "a/code.txt", "b/prose.txt", "b/code.txt")
    assert labels([tmp_path / "a/code.txt", tmp_path / "b/prose.txt"]) == ["code", "prose"]
    assert labels([tmp_path / "a/code.txt", tmp_path / "b/code.txt"]) == ["a", "b"]


def test_labels_on_request(tmp_path: Path) -> None:
    make(tmp_path, "a/code.txt", "b/code.txt")
    assert labels(tmp_path, label_by="stem") == ["code", "code"]
    assert labels(tmp_path, label_by="folder") == ["a", "b"]
    assert labels(tmp_path, label_by="none") == ["all", "all"]


# Faults


def test_missing_things(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "x")
    fails(r'no file or folder .*corpsu\.txt\. Did you mean "corpus\.txt"', tmp_path / "corpsu.txt")
    fails(r'pattern ".*\*\.md" matches no file', str(tmp_path / "*.md"))
    fails("No text source", [])
    (tmp_path / "empty").mkdir()
    fails("holds no text files .it is empty", tmp_path / "empty")
    write(tmp_path / "pics" / "a.png", b"\x89PNG")
    fails(r"holds no text files .it has only \.png files", tmp_path / "pics")


@pytest.mark.parametrize("content", ["", " \n\t\r\n ", "\ufeff"])
def test_a_corpus_without_text(tmp_path: Path, content: str) -> None:
    fails(r"a\.txt holds no text", write(tmp_path / "a.txt", content))


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": " \\n"}\n{"text": "x"}')) == ["x"]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    fails(r"latin\.txt is not UTF-8 \(byte 0xe9 at offset 3\)", write(tmp_path / "latin.txt", "café".encode("latin-1")))
    fails("looks like UTF-16", write(tmp_path / "wide.txt", "\ufeffcafé".encode("utf-16-le")))
    fails(
        r"a\.jsonl:2 is not UTF-8 \(byte 0xe9 at offset 30\)",
        write(tmp_path / "a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}'),
    )


def test_byte_order_marks_and_line_endings_are_normalised_and_nul_is_kept(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\ufeffone\r\ntwo\0\rthree")) == ["one\ntwo\0\rthree"]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "x"', r"a\.jsonl:2 is not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:2 is not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", r"a\.jsonl:2 is not valid JSON"),
        ('["text"]', r"a\.jsonl:2 holds a JSON list"),
        ('{"txt": "x", "id": 1}', r'a\.jsonl:2 has no field "text" \(it has: "txt", "id"\)\. Did you mean "txt"'),
        ("{}", r"it has: none"),
        ('{"text": 5}', r'a\.jsonl:2: the field "text" is a number'),
        ('{"text": null}', r"is null, but it must be a string"),
        ('{"text": ["x"]}', r"is a list"),
        ('{"text": "ab\\ud800"}', r"a\.jsonl:2: the text has half a surrogate pair \('\\ud800' at character 2\)"),
    ],
)
def test_a_broken_line_stops_or_is_counted(tmp_path: Path, line: str, match: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n{line}\n{{"text": "three"}}\n')
    fails(match, file)
    documents = read_documents(file, on_error="skip")
    assert [document.text for document in documents] == ["one", "three"]
    assert documents.skipped == 1
    assert len(documents.problems) == 1


def test_a_json_array_is_explained(tmp_path: Path) -> None:
    fails("one object a line, not one array", write(tmp_path / "a.json", '[\n{"text": "x"}\n]'))


@pytest.mark.parametrize("value", ["null", "1.5", "true", '""', "[]"])
def test_label_fields_must_be_names(tmp_path: Path, value: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "x", "kind": {value}}}')
    fails(r':1: the label field "kind" is', file, label_field="kind")
    fails(r'has no field "sort"', file, label_field="sort")


def test_skipping_everything_is_still_an_empty_corpus(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "{\n{\n")
    fails(r"holds no text \(2 broken records were skipped, the first: .*a\.jsonl:1", file, on_error="skip")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_truncated_and_false_gzip(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps({"text": f"line {n} {n * 7919}"}) + "\n" for n in range(5000))
    file = write(tmp_path / name, lines)
    file.write_bytes(file.read_bytes()[:-2000])
    fails(r"a\..*gz is truncated or damaged", file)
    if "jsonl" in name:
        documents = read_documents(file, on_error="skip")
        assert len(list(documents)) > 1000
        assert documents.skipped == 1
    file.write_bytes(b"plain text")
    fails(r"a\..*gz is truncated or damaged", file)


def test_truncated_and_flipped_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text number {n} {n * 7919}" for n in range(2000)]})
    pq.write_table(table, file, write_page_checksum=True, compression="none", use_dictionary=False)
    data = file.read_bytes()
    at = data.index(b"text number 1000") + 2
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    fails(r"a\.parquet is not a whole parquet file .*(CRC|checksum|corrupt)", file)
    file.write_bytes(data[: len(data) // 2])
    fails(r"a\.parquet is not a whole parquet file", file)
    file.write_bytes(b"")
    fails(r"a\.parquet is not a whole parquet file", file)


def test_parquet_fields(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x"], "text": pa.array([None], pa.string()), "n": [1]}), file)
    fails(r'row 1: the field "text" is null', file)
    fails(r'row 1: the field "n" is a number', file, text_field="n")
    fails(r'has no field "contents" .*Did you mean "content"', file, text_field="contents")


def test_a_very_long_line_is_fine(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 20_000_000}))
    assert [len(text) for text in texts(file)] == [20_000_000]


def test_options_that_do_not_exist(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "x")
    for option in ("label_by", "on_error", "document"):
        with pytest.raises(ConfigError, match=f'{option} is "foldr"'):
            read_documents(file, **{option: "foldr"})  # type: ignore[arg-type]
    with pytest.raises(MoesaicError, match='Did you mean "folder"'):
        read_documents(file, label_by="foldr")  # type: ignore[arg-type]
