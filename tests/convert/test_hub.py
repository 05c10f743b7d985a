"""Hub ids: what counts as a folder, snapshots in a cache made by hand, every failure a sentence; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import moesaic as mo
from moesaic.checkpoint.untrusted import safe_member
from moesaic.convert.companions import COMPANIONS as ALL_COMPANIONS
from moesaic.convert.convert import convert
from moesaic.convert.hub import UNWANTED, WANTED, resolve
from moesaic.errors import CheckpointError, MoesaicError
from tests.command import call
from tests.convert.tiny_checkpoint import COMPANIONS, make_hf, same, tensors_of

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, an empty working folder, and no network whatever happens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def no_network(*args: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)


def cached(tmp_path: Path, folder: Path, name: str = "owner/tiny") -> Path:
    """``folder`` as a download would leave it: blobs, and a snapshot of links to them."""
    repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        blob = repository / "blobs" / sha256(path.read_bytes()).hexdigest()
        link = snapshot / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_snapshot_is_read_through_its_links(tmp_path: Path, revision: str) -> None:
    folder = make_hf(tmp_path / "hf", max_shard_bytes=2000)
    snapshot = cached(tmp_path, folder)
    found = resolve("owner/tiny" + revision)
    assert found.samefile(snapshot)
    convert(found, tmp_path / "one")
    convert(folder, tmp_path / "other")
    assert same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other"))
    for name in COMPANIONS:
        assert (tmp_path / "one" / name).read_bytes() == (folder / name).read_bytes()
    mo.load(found)


def test_links_lead_to_the_blobs_of_the_same_download_and_nowhere_else(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, make_hf(tmp_path / "hf"))
    other = cached(tmp_path, tmp_path / "hf", "owner/other")
    for name, place in (("a.json", tmp_path / "hf" / "config.json"), ("b.json", (other / "config.json").resolve())):
        (snapshot / name).symlink_to(place)
        with pytest.raises(CheckpointError, match="link to a file outside"):
            safe_member(snapshot, name)
    safe_member(snapshot, "config.json")
    # Blobs that are a link themselves could lead anywhere.
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="link to a file outside"):
        safe_member(snapshot, "config.json")


def test_what_is_a_folder(tmp_path: Path) -> None:
    for source in ("one", "a/b/c", "./a/b", "/abs/olute", "../a/b", Path("owner/tiny"), "-x/y", "a/b c", "a/"):
        assert resolve(source) == Path(source)
    Path("owner/tiny").mkdir(parents=True)
    cached(tmp_path, make_hf(tmp_path / "hf"))
    assert resolve("owner/tiny") == Path("owner/tiny")
    # A folder of that owner stands here, so a name in it is a path mistyped; with a revision it cannot be a path.
    assert resolve("owner/other") == Path("owner/other")
    assert resolve("owner/tiny@main").name == COMMIT


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/gone", "There is no folder owner/gone, owner/gone was not downloaded before.* HF_HUB_OFFLINE is set"),
        ("owner/tiny@v9", "owner/tiny@v9 was not downloaded before"),
        ("own..er/x--y", "a name the Hugging Face hub allows"),
    ],
)
def test_what_is_not_there(tmp_path: Path, source: str, words: str) -> None:
    cached(tmp_path, make_hf(tmp_path / "hf"))
    with pytest.raises(MoesaicError, match=words):
        resolve(source)
    assert os.listdir() == []


def answer(kind: str) -> Callable[..., Any]:
    """A download that fails as the hub would let it."""

    def download(*args: Any, **more: Any) -> Any:
        made = getattr(hub.errors, kind)
        error = made.__new__(made)  # its constructor wants a response of the library that asks the hub
        error.args = ("No.\nMore lines.",)
        raise error

    return download


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "only accounts that accepted its terms"),
        ("RepositoryNotFoundError", "neither a folder owner/tiny here nor a public repository"),
        ("RevisionNotFoundError", "has no revision v1"),
        ("HTTPError", "owner/tiny@v1 from"),
        ("HfHubHTTPError", r"Fetching owner/tiny@v1 from the Hugging Face hub failed: No\.$"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", answer(kind))
    with pytest.raises(MoesaicError, match=words):
        resolve("owner/tiny@v1")


def test_no_name_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MoesaicError, match="The name of the model is empty"):
        resolve("")
    assert resolve(Path()) == Path()  # this folder
    done = call(capsys, "convert", "", "x")
    assert (done.status, done.out) == (2, "")
    assert "The name of the model is empty; give a folder, or OWNER/NAME" in done.err


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **more: Any) -> Any:
        assert more["local_files_only"] is False
        raise ConnectionError("timed out.")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(MoesaicError, match=r"failed: timed out\.$"):
        resolve("owner/tiny")


def test_a_repository_of_pickles_alone(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    cached(tmp_path, folder)
    with pytest.raises(CheckpointError, match="no safetensors files.*pickles can run any code"):
        resolve("owner/tiny")


def test_what_would_be_fetched() -> None:
    def fetched(name: str) -> bool:
        return any(fnmatch(name, p) for p in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)

    for name in (
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "manifest.json", "aside.safetensors", *COMPANIONS, *ALL_COMPANIONS,
    ):  # fmt: skip
        assert fetched(name), name
    for name in (
        "pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "consolidated.safetensors", "rng_state.pth",
        "training_args.bin", "README.md", "onnx/model.json", "model.bin",
    ):  # fmt: skip
        assert not fetched(name), name
