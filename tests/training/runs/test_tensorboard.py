"""TensorBoard's own reader finds in the event file what `metrics.jsonl` says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.runs.directory import Run
from training.runs.tensorboard import PATTERN
from training.trainer import train

CPU = torch.device("cpu")


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of every tag, from all event files of a folder."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines(folder):
        figures = {f"loss/member_{index}": loss for index, loss in enumerate(line["losses"])}
        figures |= {name: line[name] for name in ("lr", "holdout_accuracy", "images_per_s")}
        if "diversity" in line:
            matrix = line["diversity"]
            pairs = [(0, 1), (0, 2), (1, 2)]
            figures |= {f"diversity/{i}-{j}": matrix[i][j] for i, j in pairs}
        for name, value in figures.items():
            found.setdefault(f"{line['stage']}/{name}", []).append((line["epoch"], value))
    return found


def expect_equal(folder: Path) -> None:
    found, wanted = read(folder), expected(folder)
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        values = [value for _, value in found[tag]]
        assert values == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_events_say_what_the_metrics_say(tmp_path: Path) -> None:
    config = tiny_config(tensorboard=True, members=3, dverge__schedule="one-cycle")
    run = train(config, tmp_path / "run", device=CPU)
    assert len(list(run.path.glob(PATTERN))) == 1
    expect_equal(run.path)
    rates = [rate for _, rate in read(run.path)["dverge/lr"]]
    steps = 6
    assert rates == pytest.approx([config.dverge.lr_at(n, (steps - 1) / steps) for n in (0, 1)])


@pytest.mark.parametrize("before", [True, False], ids=["from its start", "only when it goes on"])
def test_a_run_that_goes_on_has_no_epoch_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """It is stopped an epoch after its last state was saved, and that epoch runs again."""
    config = tiny_config(tensorboard=before, members=3)

    class StoppedError(Exception):
        pass

    log = Run.log

    def stop(self: Run, record: dict[str, Any]) -> None:
        log(self, record)
        if (record["stage"], record["epoch"]) == ("dverge", 2):
            raise StoppedError

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", device=CPU)
    monkeypatch.undo()
    assert len(lines(tmp_path / "run")) == 4
    run = train(replace(config, tensorboard=True), tmp_path / "run", device=CPU, resume=True)
    expect_equal(run.path)
    assert [step for step, _ in read(run.path)["dverge/loss/member_2"]] == [1, 2]


def test_without_tensorboard_it_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'dverge-serve\[train,tensorboard\]'"):
        train(tiny_config(tensorboard=True), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_it_is_not_imported_unless_asked_for() -> None:
    code = "import sys, training.trainer; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
