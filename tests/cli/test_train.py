"""`dverge train --dry-run`: recipes that suit the data, and mistakes found before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dverge_serve.cli import run
from training.config import NATIVE
from training.recipe import data_overrides, load_recipe, recipe_for, recipe_names


@pytest.mark.parametrize("recipe", recipe_names())
def test_dry_run_prints_what_would_be_used(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--recipe", recipe, "--dry-run", "--set", "dverge.epochs=3"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["name"] == recipe
    assert settings["dverge"]["epochs"] == 3


def test_dry_run_says_what_the_run_will_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--set", "data.train_limit=300", "--set", "standard.epochs=2", "--members", "4"]
    assert run(["train", "--dry-run", *few, "--set", "dverge.epochs=3"]) == 0
    told = capsys.readouterr().err
    assert "standard: 2,160 gradient evaluations" in told  # 2 epochs, 270 images, 4 members
    assert "dverge: 19,440 gradient evaluations" in told  # 3 epochs, 3 steps and 3 others
    assert "270 training images" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn", "fashion-mnist"])
def test_a_named_set_has_a_recipe_that_suits_it(data: str) -> None:
    name, own = recipe_for(data)
    config = load_recipe(name, own | data_overrides(data))
    assert (config.name, config.data.name) == (data, data)
    mode, size = NATIVE[data]
    assert (config.data.mode, config.data.crop) == (mode, size)


def test_a_recipe_of_another_size_than_the_named_set_is_refused_before_any_download(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["train", "--recipe", "digits", "--data", "cifar10"]) == 2
    assert "as the images of 'cifar10' are" in capsys.readouterr().err


def test_a_wrong_folder_is_a_mistake_on_a_dry_run_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["train", "--data", str(tmp_path / "nowhere"), "--dry-run"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["name"] == "images"
    assert "no folder" in told.err


def test_an_architecture_that_does_not_take_the_images_is_a_mistake(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ["--set", "data.train_limit=64", "--set", "architecture=torchvision:alexnet"]
    assert run(["train", "--out", str(tmp_path / "run"), *few]) == 2
    assert "does not take images of 8x8" in capsys.readouterr().err


def test_training_says_where_it_begins_goes_on_and_has_ended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    settings = {"standard.epochs": 1, "dverge.epochs": 1, "data.train_limit": 60, "width": 8}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = ["train", "--out", str(out), "--members", "2", *words]
    with monkeypatch.context() as patch:  # Ctrl-C in the second stage
        patch.setattr("training.trainer.diversity", lambda *_: _interrupt())
        patch.setattr("training.trainer._measures_diversity", lambda *_: _second_stage(out))
        assert run(command) == 130
    told = capsys.readouterr().err
    assert f"training 'digits' on cpu into {out}" in told
    assert told.endswith(f"dverge: interrupted; go on with `dverge train --resume --out {out}`\n")
    assert run(["train", "--resume", "--out", str(out)]) == 0
    assert "going on after epoch 0 of dverge training" in capsys.readouterr().err
    assert run(["train", "--resume", "--out", str(out)]) == 0
    assert f"{out} is finished: nothing is left to train" in capsys.readouterr().err


def _second_stage(out: Path) -> bool:
    return (out / "standard.safetensors").exists()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_wrong_folder_is_told_before_anything_is_said_to_begin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dverge: no folder")
    assert not (tmp_path / "run").exists()
