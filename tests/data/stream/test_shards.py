"""Shards anywhere: listed in one order, recognised again, every fault one sentence; the hub and the web by real clients."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moesaic.data.readers import read_documents
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.shards import Shard, list_shards
from moesaic.errors import DataError
from tests.data.stream.servers import Hub, Server, serving
from tests.data.stream.shards import config, documents, feed_of, no_pauses, rows_of, slow_steps, texts_of, write_shards

LINE = b'{"text": "some words"}\n'


def listed(source: Any, **more: Any) -> list[Shard]:
    return list(list_shards(config(source, **more), Patience(0)))


def fails(match: str, source: Any, **more: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        listed(source, **more)
    assert "\n" not in str(caught.value)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


# ---- files here -------------------------------------------------------------------------------------------------


def test_local_files_folders_and_patterns_in_the_order_of_readers(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "b", documents(3, 2))
    (tmp_path / "a.txt").write_text("text")
    sources = [str(tmp_path / "b" / "*.jsonl"), str(folder), str(tmp_path / "a.txt")]
    shards = listed(sources)
    assert [shard.name for shard in shards] == [
        *(f"{folder}/name-0000{n}.jsonl" for n in range(3)),
        f"{tmp_path}/a.txt",
    ]
    assert [shard.label for shard in shards] == ["b", "b", "b", tmp_path.name]  # as for text in memory
    assert [shard.label for shard in listed(sources, label_by="stem")] == ["name", "name", "name", "a"]
    assert sorted({document.label for document in read_documents(sources)}) == sorted({shard.label for shard in shards})
    for shard in shards:
        with shard.open(Patience(0)) as file:
            assert file.read() == Path(shard.name).read_bytes()


def test_a_stamp_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    big = bytes(range(256)) * 1000
    for name, data in [("a.txt", big), ("b.txt", big), ("c.txt", big[:-1] + b"x"), ("d.txt", b"x" + big[1:])]:
        (tmp_path / name).write_bytes(data)
    a, b, c, d = (shard.stamp for shard in listed(tmp_path))
    assert a == b
    assert len({a, c, d}) == 3


def test_faults_of_local_sources(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", documents(2, 2))
    fails(r"no file or folder .*textt\. Did you mean \"text\"", tmp_path / "textt")
    fails(r'pattern ".*\*\.csv" matches no file', f"{folder}/*.csv")
    (folder / "name-00002.jsonl").write_bytes(b"")
    fails(r"name-00002.jsonl is empty \(0 bytes\); remove it, or leave .* data.on_error=skip", folder)
    assert len(listed(folder, on_error="skip")) == 2
    (folder / "name-00002.jsonl").rename(folder / "empty.txt")
    assert len(listed(folder)) == 3  # an empty text is a blank document
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_bytes(b"")
    fails("holds no text: every file is empty", tmp_path / "blank")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    fails("was written by save_to_disk, which cannot be streamed", saved)


def test_addresses_need_a_stream() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/x can only be streamed; add --set data.stream=true"):
        read_documents("s3://bucket/x")


def test_unknown_and_missing_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(r'begins with "s33://", which no file system answers to\. Did you mean "s3"', "s33://bucket/x.jsonl")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fails(r"Reading s3:// needs another package; install it with: pip install s3fs", "s3://bucket/x.jsonl")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    fails(
        r"Reading https:// needs another package; install it with: pip install 'moesaic\[data\]'", "https://x/y.jsonl"
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [("fsspec", "memory://a.jsonl"), ("pyarrow", "a.parquet"), ("huggingface_hub", "hf://owner/name")],
)
def test_a_missing_library_names_the_extra(
    tmp_path: Path, module: str, source: str, monkeypatch: pytest.MonkeyPatch, memory: MemoryFileSystem
) -> None:
    memory.pipe("/a.jsonl", LINE)
    here = (
        write_shards(tmp_path, [["some words"]], ".parquet") / "name-00000.parquet" if module == "pyarrow" else source
    )
    honest = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named '{name}'")
        return honest(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=rf"needs ({module}|another package); install it with: pip install 'moesaic\[data\]'"
    ):
        feed_of(str(here)).next_step()


# ---- any fsspec file system -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_any_file_system_streams_as_local_files_do(tmp_path: Path, suffix: str, memory: MemoryFileSystem) -> None:
    shards = documents(5, 9)
    write_shards(tmp_path, shards, suffix)
    for file in tmp_path.iterdir():
        memory.pipe(f"/deep/text/{file.name}", file.read_bytes())
    memory.pipe("/deep/text/.hidden.jsonl", b"{")
    memory.pipe("/deep/text/README.md", b"about")
    expected = slow_steps(shards, 6)
    for source in ("memory://deep", f"memory://deep/text/*{suffix}", f"file://{tmp_path}", tmp_path):
        feed = feed_of(source)
        assert [rows_of(feed.next_step()) for _ in range(6)] == expected
    one = listed(f"memory://deep/text/name-00003{suffix}")
    assert [(shard.name, shard.label) for shard in one] == [(f"memory:///deep/text/name-00003{suffix}", "name")]


def test_faults_of_addresses(memory: MemoryFileSystem) -> None:
    memory.pipe("/text/a.png", b"x")
    fails(r"memory:///?nothing.jsonl is not there", "memory://nothing.jsonl")
    fails(r"memory:///?nothing is not there", "memory://nothing")
    fails(r'pattern "memory://text/\*.jsonl" matches no file', "memory://text/*.jsonl")
    fails(r"The folder memory://text holds no text files \(it has only .png files\)", "memory://text")


class Flaky(MemoryFileSystem):
    """``flaky://``: the files of ``memory://``, where opening, asking and reading fail as ``plan`` says."""

    protocol = "flaky"
    plan: Iterator[bool] = iter(())

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    @classmethod
    def fail(cls) -> None:
        if next(cls.plan, False):
            raise TimeoutError("the read operation timed out")

    def info(self, path: str, **more: Any) -> Any:
        self.fail()
        return super().info(path, **more)

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self.fail()
        return FlakyFile(self.cat_file(path))


class FlakyFile(io.BytesIO):
    """Many short reads, each of which may fail."""

    def read(self, size: int | None = -1, /) -> bytes:
        Flaky.fail()
        return super().read(min(size, 200) if size and size > 0 else size)


@pytest.fixture
def flaky(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.plan = iter(())
    yield Flaky
    Flaky.plan = iter(())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_bad_connection_changes_nothing(
    tmp_path: Path, suffix: str, flaky: type[Flaky], memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = no_pauses(monkeypatch)
    shards = documents(4, 40)
    for file in write_shards(tmp_path, shards, suffix).iterdir():
        memory.pipe(f"/text/{file.name}", file.read_bytes())
    said: list[str] = []
    texts = texts_of("flaky://text", Patience(2, said.append))
    flaky.plan = (n % 5 in (0, 1) for n in range(10**9))  # two of five fail: more in a row than are forgiven never come
    feed = feed_of("flaky://text")
    feed._texts = texts
    assert [rows_of(feed.next_step()) for _ in range(10)] == slow_steps(shards, 10)
    assert len(slept) > 20
    assert "could not be read (the read operation timed out); trying again in 1 s (1/2)." in said[0]


def test_a_dead_connection_ends_in_words_and_may_come_back(
    tmp_path: Path, flaky: type[Flaky], memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pauses(monkeypatch)
    shards = documents(4, 9)
    for file in write_shards(tmp_path, shards).iterdir():
        memory.pipe(f"/text/{file.name}", file.read_bytes())
    feed = feed_of("flaky://text", prefetch=2)
    expected = slow_steps(shards, 12)
    found = []
    flaky.plan = (n > 12 for n in range(10**9))  # works for a while, then not at all
    with pytest.raises(
        DataError, match=r"name-0000\d.jsonl could not be read in 3 tries \(the read operation timed out\)"
    ):
        found += [rows_of(feed.next_step()) for _ in range(12)]
    flaky.plan = iter(())
    feed.close()
    done = feed.state_dict()["steps"]
    assert [rows_of(feed.next_step()) for _ in range(12 - done)] == expected[done:]
    flaky.plan = (True for _ in range(10**9))
    with pytest.raises(DataError, match=r"flaky://text.* could not be read in 1 tries"):
        listed("flaky://text/name-00001.jsonl")
    feed.close()


def test_damage_is_the_data_s_fault_and_may_be_skipped(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", documents(2, 60), ".jsonl.gz")
    file = folder / "name-00001.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-40])
    feed = feed_of(folder, lanes=1)
    with pytest.raises(
        DataError, match=r"name-00001.jsonl.gz is truncated or damaged .* left out with on_error=\"skip\""
    ):
        [feed.next_step() for _ in range(60)]
    said: list[str] = []
    feed = feed_of(folder, lanes=1, on_error="skip")
    feed._skipped.patience = Patience(0, said.append)
    for _ in range(60):
        feed.next_step()
    assert said[0].startswith("Broken records left out so far: 1. The last one: ")
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8 \(byte 0xe9 at offset 3\)"):
        feed_of(folder / "bad.txt").next_step()
    (folder / "bad.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(DataError, match=r"bad.parquet is not a whole parquet file"):
        feed_of(folder / "bad.parquet").next_step()


# ---- the web and the hub, by their real clients -----------------------------------------------------------------


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_files_on_the_web(tmp_path: Path, etags: bool, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    no_pauses(monkeypatch)
    shards = documents(3, 9)
    files = {f"/{f.name}": f.read_bytes() for f in write_shards(tmp_path, shards, suffix).iterdir()}
    with serving(Server(files)) as server:
        server.etags = etags
        addresses = [f"{server.address}{name}?token=secret" for name in sorted(files)]
        assert [shard.name for shard in listed(addresses)] == [f"{server.address}{name}" for name in sorted(files)]
        feed = feed_of(addresses)
        server.failures = [503, 500]
        assert [rows_of(feed.next_step()) for _ in range(5)] == slow_steps(shards, 5)
        feed_of(addresses).load_state_dict(feed.state_dict())
        server.files |= {sorted(files)[1]: files[sorted(files)[1]].replace(b"a", b"b") + b"x"}
        with pytest.raises(DataError, match=rf"name-00001{suffix} has .* bytes, but the checkpoint knows") as caught:
            feed_of(addresses).load_state_dict(feed.state_dict())
        assert "secret" not in str(caught.value)
        name = sorted(files)[0]
        assert len(listed([f"{server.address}{name}?part={n}" for n in (1, 2, 2)])) == 2
        server.failures = [503] * 9
        with pytest.raises(DataError, match=r"could not be read in 3 tries \(.*503") as caught:
            feed_of(addresses).next_step()
        assert "secret" not in str(caught.value)
        server.failures = []
        fails(r"http://127.*/none.jsonl is not there", f"{server.address}/none.jsonl?token=secret")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """``owner/name``, reached by huggingface_hub's own client."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with serving(Hub({})) as server:
        assert isinstance(server, Hub)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


def names(source: str) -> list[str]:
    return [shard.name.split(f"{Hub.commit}/")[1] for shard in listed(source)]


def test_which_files_of_a_data_set(hub: Hub) -> None:
    hub.files |= dict.fromkeys(("README.md", ".gitattributes", "dataset_infos.json"), LINE)
    hub.files |= {f"en/train-0000{n}-of-00002.jsonl": LINE for n in range(2)}
    hub.files |= {f"de/{split}/part.jsonl": LINE for split in ("train", "validation")}
    assert names("hf://owner/name") == [
        "de/train/part.jsonl",
        "en/train-00000-of-00002.jsonl",
        "en/train-00001-of-00002.jsonl",
    ]
    assert names("hf://owner/name/en") == ["en/train-00000-of-00002.jsonl", "en/train-00001-of-00002.jsonl"]
    assert names("hf://owner/name:validation") == ["de/validation/part.jsonl"]
    assert names("hf://owner/name@main/de:train") == ["de/train/part.jsonl"]
    assert names(f"hf://datasets/owner/name@{hub.commit}/de/*/*.jsonl") == [
        "de/train/part.jsonl",
        "de/validation/part.jsonl",
    ]
    assert {shard.label for shard in listed("hf://owner/name")} == {"name"}
    fails(r'has no file of the split "test" \(it has: de/train/part.jsonl', "hf://owner/name:test")
    fails(r"has no folder fr \(it has: de/train, de/validation, en\)", "hf://owner/name/fr")
    fails(r'The data set owner/name has no revision "v9"', "hf://owner/name@v9")
    fails(r"There is no data set other/name on the hub, or it is private", "hf://other/name")
    fails(r"hf://name is not a data set that can be streamed; write hf://OWNER/NAME", "hf://name")


def test_files_that_say_nothing_of_splits_are_for_training(hub: Hub) -> None:
    hub.files |= {"a.jsonl": LINE, "b.jsonl": LINE, "test.jsonl": LINE}
    assert names("hf://owner/name") == ["a.jsonl", "b.jsonl"]
    fails(r'no file of the split "train"', "hf://owner/name:train")


def test_the_hub_streams_as_local_files_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch)
    shards = documents(5, 9)
    for file in write_shards(tmp_path, shards, ".parquet").iterdir():
        hub.files[f"data/train-{file.name}"] = file.read_bytes()
    feed = feed_of("hf://owner/name")
    assert [rows_of(feed.next_step()) for _ in range(6)] == slow_steps(shards, 6)
    # Every file was read from the commit that was listed, so a push in between changes nothing.
    read = [request for request in hub.requests if "resolve" in request]
    assert read
    assert all(f"/resolve/{hub.commit}/" in request for request in read)
    state = feed.state_dict()
    feed_of("hf://owner/name").load_state_dict(state)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    name = "data/train-name-00002.parquet"
    hub.files[name] = hub.files[name][:-1] + b"x"
    with pytest.raises(DataError, match=r"train-name-00002.parquet is not what the checkpoint knows"):
        feed_of("hf://owner/name").load_state_dict(state)


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    fails(
        "hf://owner/name cannot be streamed while HF_HUB_OFFLINE is set; unset it, or give local files",
        "hf://owner/name",
    )
