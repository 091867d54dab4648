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
