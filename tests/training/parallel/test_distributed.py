"""Training by several processes that torchrun starts: the same members, whatever their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dverge_serve.cli import run
from dverge_serve.errors import PeerError, UserError
from dverge_serve.progress import Progress
from tests.training.networks import tiny_config
from tests.training.parallel.ranks import VARIANTS, train_variant
from training.parallel import distributed
from training.parallel.distributed import join
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology
from training.runs.directory import Run
from training.trainer import train

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
# What how many processes train of how many members. Random starts of adversarial training are drawn
# for each share of a batch, so four processes with two members give others.
TRAINED = {
    (2, 3): [name for name in VARIANTS if name != "broken"],
    (3, 3): ["dverge", "adp", "gal"],
    (4, 2): ["dverge", "batch", "adp", "gal", "resumed"],
}


def torchrun(count: int, *arguments: str) -> list[str]:
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return [sys.executable, "-m", *run, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@cache
def trained_by(count: int, members: int, folder: Path) -> Path:
    """Return where `count` processes trained every variant."""
    out = folder / f"{count}x{members}"
    out.mkdir()
    names = [*TRAINED[count, members], "broken"]
    if "resumed" in names:
        interrupt(out / "0" / "resumed", members)
    command = torchrun(count, "tests.training.parallel.ranks", str(out), str(members), *names)
    done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return out


def interrupt(out: Path, members: int) -> None:
    """Leave what a kill in the second epoch of stage two leaves."""
    plain, lines = Run.log, 0

    def log(run: Run, record: dict[str, Any]) -> None:
        nonlocal lines
        lines += 1
        if lines == 3:
            raise KeyboardInterrupt
        plain(run, record)

    with (
        mock.patch("training.trainer.SAVE_EVERY_S", 0.0),
        mock.patch.object(Run, "log", log),
        pytest.raises(KeyboardInterrupt),
    ):
        train_variant("resumed", members, out)
    state = Run(out).load_state()
    assert state is not None
    assert state[:2] == (1, 1)
    assert any(name.startswith("momentum") for name in state[2])


@cache
def trained_alone(name: str, members: int, folder: Path) -> Path:
    return train_variant(name, members, folder / f"alone{members}" / name).path


def furthest(one: Path, other: Path, which: str) -> float:
    """Return how far apart the runs' members are at most, in any tensor."""
    left, right = (load_file(path / f"{which}.safetensors") for path in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s")
    return lines


@pytest.mark.parametrize(
    ("count", "members", "name"),
    [(*job, name) for job, names in TRAINED.items() for name in names],
)
def test_the_members_are_the_same_whatever_the_number_of_processes(
    count: int, members: int, name: str, folder: Path
) -> None:
    out = trained_by(count, members, folder) / "0" / name
    alone = trained_alone(name, members, folder)
    assert furthest(out, alone, "standard") < 1e-9
    assert furthest(out, alone, "members") < 1e-9
    standard = trained_alone("standard", members, folder)
    assert name == "standard" or furthest(alone, standard, "members") > 1e-3  # it is not idle
    for line, other in zip(figures(out), figures(alone), strict=True):
        assert line["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert line["holdout_accuracy"] == other["holdout_accuracy"]
        assert (line["stage"], line["epoch"]) == (other["stage"], other["epoch"])
    found, expected = Run(out).checkpoint, Run(alone).checkpoint
    assert found["provenance"]["processes"] == count
    assert (found["labels"], found["train_sha256"]) == (
        expected["labels"],
        expected["train_sha256"],
    )


@pytest.mark.parametrize(("count", "members"), list(TRAINED))
def test_the_first_process_alone_writes_and_all_end_alike(
    count: int, members: int, folder: Path
) -> None:
    out = trained_by(count, members, folder)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"0"}
    for rank in range(count):
        for name in TRAINED[count, members]:
            assert (out / f"ended.{rank}.{name}").read_text() == "finished"
        broken = (out / f"ended.{rank}.broken").read_text()
        said = "UserError: the loss of member 0 became nan in standard epoch 1, steps 1 to 6;"
        assert broken.startswith(said if rank == 0 else "PeerError: another process"), broken
    assert not Run(out / "0" / "broken").finished


SETTINGS = {
    "members": 3,
    "width": 8,
    "batch_size": 16,
    "standard.epochs": 1,
    "dverge.epochs": 8,
    "dverge.steps": 1,
    "data.train_limit": 100,
}


def test_a_killed_process_ends_the_others_and_one_alone_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    command = torchrun(2, "dverge_serve", "train", "--out", str(out), *words)
    agent = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    log = out / "metrics.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):  # in stage two
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.01)
    children = psutil.Process(agent.pid).children(recursive=True)
    second = [child for child in children if child.environ().get("RANK") == "1"]
    assert len(second) == 1
    second[0].kill()
    _, errors = agent.communicate(timeout=60)  # they do not wait out a timeout of their own
    assert agent.returncode != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not Run(out).finished
    shown = [line for line in errors.splitlines() if "members:" in line or "training '" in line]
    assert len(shown) == len(set(shown))  # nothing is said twice

    settings = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    config = tiny_config(**settings, data__test_limit=0)
    resumed = train(config, out, device=CPU, resume=True)
    at_once = train(config, tmp_path / "other", device=CPU)
    assert resumed.checkpoint["provenance"]["processes"] == 1
    assert furthest(resumed.path, at_once.path, "members") < 1e-4
    assert [line["epoch"] for line in figures(out)] == [1, *range(1, 9)]


def test_over_nccl_a_process_that_fails_alone_ends_all(tmp_path: Path) -> None:
    """It says why and ends, though NCCL would wait; so the others end, and say that one did."""
    module = "tests.training.parallel.failing_rank"
    words = ["train", "--device", "cuda", "--members", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        torchrun(2, module, *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("dverge: ")]
    assert sorted(line.partition(";")[0] for line in said) == [
        "dverge: another process of this training ended",
        "dverge: image 3 is broken",
    ]
    assert "exitcode  : 2 " in done.stderr


@pytest.mark.parametrize(
    ("mine", "other", "backend"), [("a", "b", "nccl"), ("a", "a", "gloo"), ("", "", "gloo")]
)
def test_tensors_go_over_nccl_where_every_process_has_a_gpu_of_its_own(
    mine: str, other: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever GPUs each process is let see: a number says nothing of which they are."""

    def gather(every: list[str], own: str) -> None:
        assert own == mine
        every[:] = [mine, other]

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid=mine))
    device = torch.device("cuda" if mine else "cpu")
    assert distributed._backend(device) == backend


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


@pytest.mark.parametrize("count", [4, 5, 7])
def test_a_number_of_processes_that_does_not_fit_is_said_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(members=3)
    pretend(monkeypatch, 0, count)
    wanted = rf"{count} processes for 3 members; expected 1 to 3 .*, or a multiple of 3"
    with pytest.raises(UserError, match=wanted) as caught, join(config, CPU):
        pass
    assert caught.value.exit_code == 2
    pretend(monkeypatch, count - 1, count)
    with pytest.raises(PeerError) as silent, join(config, CPU):
        pass
    assert silent.value.exit_code == 2


def test_the_command_says_nothing_where_the_first_process_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in ((0, 1), (3, 0)):
        pretend(monkeypatch, rank, 4)
        assert run(["train", "--members", "3", "--out", str(tmp_path / "run")]) == 2
        found = capsys.readouterr()
        assert (found.out, len(found.err.splitlines())) == ("", lines)


def test_more_shares_than_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, 12)
    with (
        pytest.raises(UserError, match="batch_size = 2 for 4 processes a member"),
        join(tiny_config(members=3, batch_size=2), CPU),
    ):
        pass


def test_without_torchrun_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with join(tiny_config(), CPU) as (topology, device):
        assert (topology, device) == (SINGLE_PROCESS, CPU)
    pretend(monkeypatch, 0, 1)
    with join(tiny_config(), CPU) as (topology, _):
        assert topology is SINGLE_PROCESS


@pytest.mark.parametrize(
    ("blocks", "members", "spread"),
    [
        (1, 3, [[0, 1, 2]]),
        (2, 3, [[0], [1, 2]]),
        (3, 3, [[0], [1], [2]]),
        (3, 8, [[0, 1], [2, 3, 4], [5, 6, 7]]),
    ],
)
def test_every_member_has_one_place(blocks: int, members: int, spread: list[list[int]]) -> None:
    assert [
        list(ProcessTopology(rank, blocks).local_members(members)) for rank in range(blocks)
    ] == spread


def test_shares_of_a_batch_are_equal_and_of_different_images() -> None:
    images = torch.arange(11).float().view(11, 1, 1, 1)
    batches = [(images, torch.arange(11), images + 0.5), (images[:1], torch.arange(1), images[:1])]
    parts = [list(ProcessTopology(rank, 1, 2).shard(batches)) for rank in range(2)]
    assert [len(found) for found in parts] == [1, 1]  # one image is too few for two
    assert [found[0][1].tolist() for found in parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for ((source, labels, target),) in parts:
        assert source.flatten().tolist() == labels.tolist()
        assert target.flatten().tolist() == (labels + 0.5).tolist()
