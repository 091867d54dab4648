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
    assert (
        "standard: 2 epochs, 2,160 gradient evaluations" in told
    )  # 2 epochs, 270 images, 4 members
    assert "dverge: 3 epochs, 19,440 gradient evaluations" in told  # 3 epochs, 3 steps and 3 others
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
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "file").touch()
    for data, words in (
        ("fotos", "no folder fotos; expected a folder of train/<class>/"),
        ("cifar", "did you mean 'cifar10'?"),
        ("file", "file is no folder; expected"),
        ("photos/train", f"give --data {tmp_path / 'photos'}\n"),
        ("photos/train/cat", f"give --data {tmp_path / 'photos'}\n"),
    ):
        assert run(["train", "--data", data, "--dry-run"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert words in told.err


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
        patch.setattr("training.trainer.measures_diversity", lambda *_: _second_stage(out))
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


FEW = ["--set", "data.train_limit=60", "--members", "2", "--set", "width=8"]


@pytest.fixture
def a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step that is timed take a second, by itself; an epoch of `FEW` may be one step."""
    monkeypatch.setattr("training.estimate.time.monotonic", iter(range(100)).__next__)
    monkeypatch.setattr("training.estimate.overlaps", lambda *_: False)


@pytest.mark.usefixtures("a_second_a_step")
def test_a_time_budget_shortens_both_stages_and_is_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    long = ["--set", "batch_size=54", "--set", "standard.epochs=50", "--set", "dverge.epochs=100"]
    assert run(["train", "--out", str(out), *FEW, *long, "--budget", "5s"]) == 0
    recorded = json.loads((out / "config.json").read_text())
    assert (recorded["standard"]["epochs"], recorded["dverge"]["epochs"]) == (1, 3)
    told = capsys.readouterr().err
    assert "standard: 1 epochs" in told
    assert "standard 1 epochs (108 gradients), dverge 3 epochs" in told
    assert run(["train", "--out", str(out), "--resume", "--budget", "5s"]) == 2
    assert "its own epochs" in capsys.readouterr().err


@pytest.mark.usefixtures("a_second_a_step")
def test_a_dry_run_shows_the_epochs_of_a_time_budget(capsys: pytest.CaptureFixture[str]) -> None:
    long = ["--set", "batch_size=54", "--set", "standard.epochs=50", "--set", "dverge.epochs=100"]
    assert run(["train", "--dry-run", *FEW, *long, "--budget", "1m"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["standard"]["epochs"], settings["dverge"]["epochs"]) == (18, 36)


@pytest.mark.parametrize("budget", ["", "10", "m", "1d", "-5m", "0s", "10m5h"])
def test_a_budget_that_is_no_time_is_refused(
    budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *FEW, "--budget", budget]) == 2
    assert "a time such as 90s, 10m or 1h30m" in capsys.readouterr().err


@pytest.mark.usefixtures("a_second_a_step")
def test_a_budget_too_small_or_for_several_processes_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*FEW, "--set", "batch_size=2", "--out", str(tmp_path / "run")]
    assert run(["train", *few, "--budget", "1s"]) == 2
    assert "dverge: --budget 1s, less than an epoch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(["train", *few, "--budget", "1m"]) == 2
    assert "--budget with torchrun" in capsys.readouterr().err
