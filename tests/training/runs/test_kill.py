"""SIGKILL and SIGINT at any moment leave a run that resume continues to the very same bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.config import Data
from training.data.splits import TrainingData, load_training
from training.runs.directory import Run
from training.runs.lock import locked
from training.trainer import train

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {"batch_size": 32, "dverge__steps": 2}
RESULTS = ("members.safetensors", "standard.safetensors", "config.json", "probe.npz")


class Driver:
    """A process that trains in children of its own, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.runs.driver"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def start(self, out: Path, *, resume: bool = False, hold: tuple[str, str, int] | None) -> int:
        """Begin a training run and return its process id."""
        assert self.process.stdin is not None
        task = {"out": str(out), "settings": SETTINGS, "resume": resume, "hold": hold}
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.expect("started")["pid"])

    def expect(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["event"] == event, answer
        return answer

    def kill_at(self, out: Path, hold: tuple[str, str, int], *, resume: bool = False) -> None:
        """Train until the held call, and kill the process there."""
        pid = self.start(out, resume=resume, hold=hold)
        self.expect("held")
        os.kill(pid, signal.SIGKILL)
        assert self.expect("ended")["code"] == -signal.SIGKILL

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupted, and that saved no state within a stage."""
    out = tmp_path_factory.mktemp("whole") / "run"
    go_on(out)
    return out


def go_on(out: Path) -> None:
    """Train in this process, or go on with what is there."""
    config = tiny_config(**SETTINGS)
    train(config, out, device=torch.device("cpu"), resume=True, data=images(config.data))


@functools.cache
def images(data: Data) -> TrainingData:
    return load_training(data)


def expect_the_same(out: Path, whole: Path) -> None:
    """The run in `out` is finished, with the bytes of the uninterrupted one and nothing else."""
    assert sorted(file.name for file in out.iterdir()) == sorted(f.name for f in whole.iterdir())
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = Run(out).checkpoint, Run(whole).checkpoint
    found.pop("provenance")
    expected.pop("provenance")
    assert found == expected
    assert metrics(out) == metrics(whole)


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s")
    return lines


def test_an_uninterrupted_run_has_one_line_for_each_epoch(whole: Path) -> None:
    found = [(line["stage"], line["epoch"]) for line in metrics(whole)]
    assert found == [(stage, epoch) for stage in ("standard", "dverge") for epoch in (1, 2)]


MOMENTS: list[tuple[str, str, int]] = [
    ("rename", "before", 1),  # config.json is written, not yet under its name
    ("rename", "after", 1),  # config.json alone
    ("log", "before", 1),  # the first epoch, not yet logged
    ("log", "after", 1),  # logged, its state not yet saved
    ("save_state", "after", 1),  # in the middle of stage one
    ("save_members", "before", 1),  # stage one done, its members not written
    ("save_members", "after", 1),  # written, but the state still says stage one
    ("save_state", "after", 2),  # between the stages
    ("log", "after", 3),  # stage two, its first epoch logged and not saved
    ("save_state", "after", 3),  # in the middle of stage two
    ("save_members", "after", 2),  # the result is there, the checkpoint not
    ("finish", "before", 1),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(map(str, moment)))
def test_a_killed_run_goes_on_to_the_same_bytes(
    driver: Driver, whole: Path, tmp_path: Path, moment: tuple[str, str, int]
) -> None:
    out = tmp_path / "run"
    driver.kill_at(out, moment)
    assert not Run(out).finished
    go_on(out)
    expect_the_same(out, whole)


@pytest.mark.parametrize("call", range(2, 10))
def test_a_kill_in_the_middle_of_any_write_leaves_the_last_good_state(
    driver: Driver, whole: Path, tmp_path: Path, call: int
) -> None:
    """Each atomic write renames once; the process dies just before it, its part still there."""
    out = tmp_path / "run"
    driver.kill_at(out, ("rename", "before", call))
    assert list(out.glob(".*.part"))
    go_on(out)
    expect_the_same(out, whole)


def test_a_run_killed_again_and_again_still_ends_the_same(
    driver: Driver, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    driver.kill_at(out, ("log", "before", 1))
    for moment in (
        ("save_state", "after", 1),
        ("log", "after", 1),
        ("save_members", "after", 1),
        ("save_state", "after", 1),
        ("log", "after", 1),
        ("finish", "before", 1),
    ):
        driver.kill_at(out, moment, resume=True)
    driver.start(out, resume=True, hold=None)
    assert driver.expect("ended")["code"] == 0
    expect_the_same(out, whole)


def test_a_run_killed_after_its_checkpoint_is_finished(
    driver: Driver, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    driver.kill_at(out, ("finish", "after", 1))
    assert Run(out).finished
    (out / ".lock").unlink()  # all that the kill left
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    (out / ".lock").touch()
    go_on(out)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    expect_the_same(out, whole)


def moments(count: int) -> list[tuple[str, float]]:
    """Return random moments, each stage's in turn, as shares of the stage's length."""
    draw = random.Random(20201018)
    return [(("standard", "dverge")[number % 2], draw.random()) for number in range(count)]


def kill_at_random(driver: Driver, out: Path, stage: str, share: float) -> None:
    """Kill a run in the midst of a stage: sooner, should it have been over too soon."""
    length = 2.0  # seconds, guessed; a run that ends first says how long it takes
    while True:
        pid = driver.start(out, hold=None)
        mark = out / ("config.json" if stage == "standard" else "standard.safetensors")
        while not mark.is_file():
            time.sleep(0.001)
        begun = time.monotonic()
        while time.monotonic() - begun < share * length and not Run(out).finished:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if not Run(out).finished:
            assert driver.expect("ended")["code"] == -signal.SIGKILL
            return
        driver.expect("ended")
        length = (time.monotonic() - begun) / 2
        shutil.rmtree(out)


FEW, MANY = 3, 20


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        pytest.param(*moment, marks=[pytest.mark.long] if number >= FEW else [])
        for number, moment in enumerate(moments(MANY))
    ],
)
def test_a_run_killed_at_a_random_moment_ends_the_same(
    driver: Driver, whole: Path, tmp_path: Path, stage: str, share: float
) -> None:
    out = tmp_path / "run"
    kill_at_random(driver, out, stage, share)
    go_on(out)
    expect_the_same(out, whole)


def test_two_processes_cannot_train_into_one_folder(
    driver: Driver, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pid = driver.start(out, hold=("log", "after", 1))
    driver.expect("held")
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match=rf"another process \({pid}\) is training in") as caught:
        go_on(out)
    assert caught.value.exit_code == 2
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    os.kill(pid, signal.SIGKILL)
    driver.expect("ended")
    go_on(out)  # the kill let go of the folder
    expect_the_same(out, whole)


def test_who_waits_finds_the_work_of_the_other_done(
    driver: Driver, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other begins and ends between the first look at the folder and the lock."""
    out = tmp_path / "run"
    plain = Run.locked

    def locked(run: Run, **more: Any) -> Any:
        monkeypatch.setattr(Run, "locked", plain)
        driver.start(out, hold=None)
        assert driver.expect("ended")["code"] == 0
        return plain(run, **more)

    monkeypatch.setattr(Run, "locked", locked)
    config = tiny_config(**SETTINGS)
    data = images(config.data)
    train(config, out, device=torch.device("cpu"), resume=True, data=data, wait=True)
    assert Run.locked is plain
    expect_the_same(out, whole)


def test_a_lock_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "filelock")
    order = []

    def second() -> None:
        with locked(tmp_path, wait=True):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        while "not acquired" not in caplog.text:
            time.sleep(0.001)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_where_locks_do_not_work_nobody_is_kept_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*file/\.lock"),
        locked(tmp_path / "file"),
    ):
        pytest.fail("locked")


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Look again and again, until it holds or the process ends."""
    while not holds():
        assert process.poll() is None, "ended too early"
        time.sleep(0.01)


def test_ctrl_c_ends_the_command_in_one_line_and_resume_goes_on(tmp_path: Path) -> None:
    settings = {"standard.epochs": 2, "dverge.epochs": 150, "data.train_limit": 100, "width": 8}
    settings |= {"members": 2, "batch_size": 32, "dverge.steps": 1}
    arguments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "runs" / "mine"
    process = subprocess.Popen(
        [sys.executable, "-m", "dverge_serve", "train", "--out", str(out), *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A shell has jobs in the background ignore SIGINT, and whatever they start ignores it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "metrics.jsonl"
    wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    told = f"dverge: interrupted; go on with `dverge train --resume --out {out}`"
    assert errors.splitlines()[-1].decode() == told
    assert (tmp_path / "runs" / "latest").resolve() == out.resolve()
    assert not Run(out).finished

    config = tiny_config(dverge__epochs=150, dverge__steps=1, batch_size=32, data__test_limit=0)
    resumed = train(config, out, device=torch.device("cpu"), resume=True)
    at_once = train(config, tmp_path / "other", device=torch.device("cpu"))
    assert resumed.weights_sha256 == at_once.weights_sha256
    assert [line["epoch"] for line in metrics(out)] == [1, 2, *range(1, 151)]
