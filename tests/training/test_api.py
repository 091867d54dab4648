"""The front door of the room: `import training` offers what the command does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training
from dverge_serve.cli import run
from tests.training.networks import tiny_config

WORDS = {"width": 8, "members": 2, "batch_size": 16, "standard.epochs": 1, "dverge.epochs": 1}


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, training; training.load_recipe('digits'); training.Config; "
        "assert 'torch' not in sys.modules; assert 'training.trainer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_name_of_the_front_door_is_there_and_no_other() -> None:
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
    assert set(training.__all__) <= set(dir(training))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        training.trian  # noqa: B018


def test_a_run_by_the_functions_is_the_run_of_the_command(tmp_path: Path) -> None:
    settings = WORDS | {"data.train_limit": 100, "data.test_limit": 20}
    made = training.train(training.load_recipe("digits", settings), str(tmp_path / "a"))
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert run(["train", "--recipe", "digits", "--out", str(tmp_path / "b"), *words]) == 0
    for name in ("members.safetensors", "standard.safetensors", "config.json"):
        assert (made.path / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_runs_ensemble_answers_with_the_mean_of_its_members(tmp_path: Path) -> None:
    made = training.train(tiny_config(), str(tmp_path / "run"), device="cpu")
    images = torch.rand(3, 1, 8, 8)
    ensemble = training.load_ensemble(str(made.path))
    assert not ensemble.training
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    logits = torch.stack([member(images) for member in made.members()])
    assert torch.equal(ensemble(images), logits.mean(0))
    assert torch.equal(ensemble.member_logits(images), logits.transpose(0, 1))
    standard = torch.stack([member(images) for member in made.members("standard")]).mean(0)
    assert torch.equal(training.Run(str(made.path)).ensemble("standard")(images), standard)
    assert not torch.equal(standard, ensemble(images))
