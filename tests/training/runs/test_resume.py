"""Resuming: from nothing, from a finished run, and never with other settings or images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dverge_serve.errors import UserError
from tests.training.networks import stored, tiny_config
from tests.training.refusal import one_line
from tests.training.stopping import stopped_run
from training.data.splits import load_training
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")


def test_resuming_nothing_starts(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = train(tiny_config(), tmp_path / "empty", device=CPU, resume=True)
    assert run.weights_sha256 == Run(finished).weights_sha256


def test_resuming_with_other_settings_names_them(copy: Path) -> None:
    config = tiny_config(dverge__eps=0.3, seed=4, data__pad=2)
    for finished in (True, False):
        if not finished:
            (copy / "checkpoint.json").unlink()
        with pytest.raises(
            UserError, match=r"other settings of data.pad, dverge.eps, seed;"
        ) as caught:
            train(config, copy, device=CPU, resume=True)
        one_line(caught)


def test_resuming_a_finished_run_does_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.load_training", lambda _: pytest.fail("images were read"))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in copy.iterdir()}
    run = train(tiny_config(), copy, device=CPU, resume=True)
    assert run.finished
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in copy.iterdir()} == before


def test_resuming_with_other_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(tmp_path / "out", monkeypatch)
    data = load_training(tiny_config().data)
    stored(data.train).images[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="training images changed since") as caught:
        train(tiny_config(), tmp_path / "out", device=CPU, resume=True, data=data)
    one_line(caught)
