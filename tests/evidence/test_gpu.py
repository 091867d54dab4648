"""`benchmarks.gpu`: the smoke checks rehearsed on the CPU, and ways to step that are recorded."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import recording, smoke, steps
from benchmarks.gpu.checks import CHECKS
from dverge_serve.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def fine(device: torch.device) -> str:
    warnings.warn("a word of warning\nand more", stacklevel=1)
    return f"on {device}"


def wrong(device: torch.device) -> str:
    raise ValueError("this is wrong\nat length")


def absent(device: torch.device) -> str:
    raise SkipTest("not here")


def test_no_check_stops_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert not smoke.run([wrong, absent, fine], CPU)
    said = [re.sub(r" +\d+\.\d+s", "", line) for line in capsys.readouterr().out.splitlines()]
    assert re.fullmatch(r"FAIL wrong: ValueError: this is wrong @ .*test_gpu\.py:\d+", said[0])
    assert said[1:] == [
        "SKIP absent: not here",
        "PASS fine: on cpu",
        "       warned: a word of warning",
        "FAILED: wrong",
    ]
    assert smoke.run([absent, fine], CPU)


def test_the_checks_without_long_trainings_pass_on_the_cpu() -> None:
    slow = {"every_method_trains", "two_processes_share_one_device", "verify_quick"}
    names = [check.__name__ for check in CHECKS if check.__name__ not in slow]
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke", "cpu", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines() if " " in line[:5]]
    assert len(CHECKS) == 20
    assert (words.count("PASS"), words.count("SKIP")) == (7, 10)
    assert done.stdout.count("needs a GPU") == 10


def test_only_what_waits_for_the_gpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that finds it warns of itself, at its first use in a process."""

    def prototype(mode: str) -> None:
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations",
                stacklevel=2,
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", prototype)
    monkeypatch.setattr(recording, "METHODS", ("dverge", "transfer"))  # one has source models
    count: smoke.Check = recording.steps_do_not_wait.__wrapped__  # type: ignore[attr-defined]
    assert count(CPU) == "{'dverge': 0, 'transfer': 0}"


@pytest.mark.long
def test_all_checks_pass_on_the_cpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("FAILED: nothing\n")


class Echo:
    """Records by remembering the work: what a GPU does, without one."""

    def __init__(self, *, able: bool) -> None:
        self.able, self.recorded = able, 0

    def warm(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if not self.able:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        return work


def stepper_of(name: str, recorder: Echo, monkeypatch: pytest.MonkeyPatch) -> steps.Stepper:
    monkeypatch.setattr(steps, "CudaRecorder", lambda *_: recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return steps.Stepper(steps.WAYS[name], 2, CPU)


@pytest.mark.parametrize("name", ["published", "recorded", "recorded_benchmark", "fp32_recorded"])
def test_a_way_to_step_is_ready_before_it_is_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Echo(able=True)
    stepper, batch = stepper_of(name, recorder, monkeypatch), steps.random_batch(2, CPU)
    assert stepper.ready(batch, 2) > 0
    recorded = recorder.recorded
    assert recorded == (2 if steps.WAYS[name].recorded else 0)  # distil, update
    assert stepper.seconds(batch, 2) > 0
    assert recorder.recorded == recorded


def test_a_step_that_cannot_be_recorded_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of("recorded", Echo(able=False), monkeypatch)
    with pytest.raises(UserError, match="cannot be recorded as a CUDA graph"):
        stepper.ready(steps.random_batch(2, CPU), 2)


def test_the_bar_of_a_step_is_the_sum_over_all_layers() -> None:
    rows = [{"layer": 1, "published": 10.0, "recorded": 0.5}]
    rows.append({"layer": 2, "published": 20.0, "recorded": 1.5})
    (bar,) = steps.bars(rows)
    assert (bar["value"], bar["holds"]) == (15.0, True)
    assert steps.bars([{"layer": 1, "published": 10.0, "eager": 1.0}]) == []


def test_steps_without_a_gpu_time_what_is_not_recorded() -> None:
    (row,) = steps.measure([1], 1, 2, CPU)
    assert {key for key in steps.WAYS if key in row} == {"published", "eager", "fp32_eager"}
    assert row["eager"] > 0
