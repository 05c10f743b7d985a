"""Launch scripts: they parse, name options that exist, pass one signal on and wait, and resume where there is a checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from moesaic.cli import COMMANDS
from moesaic.terminal import options

yaml = pytest.importorskip("yaml")

RUNS = Path(__file__).parent.parent / "runs"
LOCAL, SBATCH, JOB = RUNS / "local.sh", RUNS / "slurm" / "train.sbatch", RUNS / "kubernetes" / "job.yaml"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Says how it was called; on SIGTERM waits a moment, says so, and ends as torchrun does.
STUB = """#!/usr/bin/env bash
echo "called: $*" >> "$STUB_LOG"
trap 'sleep 0.3; echo saved >> "$STUB_LOG"; exit 143' TERM
if [[ -n ${STUB_WAITS:-} ]]; then for _ in $(seq 200); do sleep 0.05; done; fi
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``torchrun``, ``srun`` and ``scontrol`` that write down what they are asked; the log."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    log.touch()
    texts = {
        "torchrun": STUB,
        "srun": STUB,
        "scontrol": '#!/usr/bin/env bash\n[[ $1 == show ]] && echo node7 || echo "scontrol: $*" >> "$STUB_LOG"\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB_LOG", str(log))
    slurm = {"JOB_ID": "42", "JOB_NODELIST": "node[7-8]", "NNODES": "2", "GPUS_ON_NODE": "4"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)
    return log


def called(log: Path) -> list[str]:
    """The words of the one call."""
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("called: ")]
    return line.removeprefix("called: ").split()


def until(log: Path, text: str) -> None:
    end = time.monotonic() + 10
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(JOB.read_text())}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = documents()["Job"]["spec"]["template"]["spec"]
    return spec


def texts() -> Iterator[str]:
    yield LOCAL.read_text()
    yield SBATCH.read_text()
    yield pod()["containers"][0]["command"][2]


@pytest.mark.parametrize("script", [LOCAL, SBATCH], ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_the_job_s_command_is_bash() -> None:
    text = pod()["containers"][0]["command"][2]
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert pod()["containers"][0]["command"][:2] == ["bash", "-ceu"]


def test_options_exist() -> None:
    """Those of torchrun that scripts use, and those of the command that the job and the README name."""
    known = {option.replace("_", "-") for action in get_args_parser()._actions for option in action.option_strings}
    for text in texts():
        call = re.search(r"torchrun (?:\\\n +)?(--.*?)-m moesaic", text, re.DOTALL)
        assert call
        used = re.findall(r"--[a-z][a-z-]+", call[1])
        assert "--max-restarts" in used
        assert set(used) <= known
    train = options(COMMANDS["train"])
    assert {word for word in pod()["containers"][0]["args"] if word.startswith("--")} <= set(train)
    readme = (RUNS / "README.md").read_text()
    planned = re.findall(r"moesaic plan-layout [^\n#]*", readme)
    assert planned
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(planned))) <= set(options(COMMANDS["plan-layout"]))


def test_the_job_is_of_one_piece() -> None:
    job, service = documents()["Job"], documents()["Service"]
    container = pod()["containers"][0]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(env["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["PROCESSES"])
    assert service["metadata"]["name"] == pod()["subdomain"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv-endpoint={first}:" in container["command"][2]
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod()["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_time_to_save_is_shorter_than_the_notice() -> None:
    text = SBATCH.read_text()
    notice = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    allowed = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", text)
    assert notice
    assert allowed
    assert int(allowed[1]) < int(notice[1])
    # Directives after the first command are not read.
    assert text.rindex("#SBATCH") < text.index("set -euo")


def test_local_starts_torchrun(stubs: Path) -> None:
    done = subprocess.run(["bash", LOCAL, "4", "--data", "a.txt", "--ep", "2", "--out", "run"], check=False, timeout=30)
    assert done.returncode == 0
    words = called(stubs)
    assert words[:4] == ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=4", "--max-restarts=3"]
    assert words[4:] == ["-m", "moesaic", "train", "--data", "a.txt", "--ep", "2", "--out", "run"]


@pytest.mark.parametrize("out", [["--out", "run"], ["--out=run"]])
def test_local_resumes_where_there_is_a_checkpoint(stubs: Path, out: list[str]) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    subprocess.run(["bash", LOCAL, "2", *out], check=True, timeout=30)
    assert called(stubs)[-1] == "--resume"
    stubs.write_text("")
    subprocess.run(["bash", LOCAL, "2", "--resume", *out], check=True, timeout=30)
    assert called(stubs).count("--resume") == 1


@pytest.mark.parametrize("args", [[], ["--data"], ["0"]])
def test_local_says_how_it_is_used(stubs: Path, args: list[str]) -> None:
    done = subprocess.run(["bash", LOCAL, *args], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "PROCESSES" in done.stderr
    assert stubs.read_text() == ""


def test_local_passes_the_signal_on(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS", "1")
    with subprocess.Popen(["bash", LOCAL, "2"]) as process:
        until(stubs, "called")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert stubs.read_text().count("saved") == 1


def test_slurm_starts_one_torchrun_a_node(stubs: Path) -> None:
    subprocess.run(["bash", SBATCH, "--out", "run", "--ep", "8"], check=True, timeout=30)
    words = called(stubs)
    assert words[:2] == ["--kill-on-bad-exit=0", "torchrun"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-id=42-0", "--rdzv-backend=c10d"} <= set(words)
    assert "--rdzv-endpoint=node7:29500" in words
    assert words[-5:] == ["train", "--out", "run", "--ep", "8"]
    assert "requeue" not in stubs.read_text()  # it ended by itself


def test_slurm_saves_and_queues_itself_again(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_WAITS", "1")
    Path("run/checkpoints").mkdir(parents=True)
    with subprocess.Popen(["bash", SBATCH, "--out=run"], stdout=subprocess.DEVNULL) as process:
        until(stubs, "called")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert called(stubs)[-1] == "--resume"
    lines = stubs.read_text().splitlines()
    # Saved once, and queued again only after that.
    assert lines[-2:] == ["saved", "scontrol: requeue 42"]
    assert lines.count("saved") == 1


def test_slurm_needs_a_folder(stubs: Path) -> None:
    done = subprocess.run(["bash", SBATCH, "--ep", "2"], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "--out FOLDER" in done.stderr
    assert stubs.read_text() == ""


def test_the_readme_names_every_script() -> None:
    readme = (RUNS / "README.md").read_text()
    for path in (LOCAL, SBATCH, JOB):
        assert path.relative_to(RUNS).as_posix() in readme
