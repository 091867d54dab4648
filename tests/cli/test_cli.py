"""The command line: every user mistake is one line and exit code 2; every code of the contract."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dverge_serve import Engine
from dverge_serve.cli import as_flags, run
from dverge_serve.engine.report import report_path
from tests.serving import tiny
from tests.verification.report.test_page import table
from training.config import NATIVE
from training.recipe import data_overrides, load_recipe, recipe_for, recipe_names


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(path)
    return path


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """A model with a whole report about it."""
    model = tmp_path / "gray.onnx"
    about = table() | {"model": table()["model"] | {"sha256": tiny.save_gray_model(model)}}
    report_path(model).write_text(json.dumps(about))
    return model


def complains(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    capsys.readouterr()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    told = [line for line in lines if line.startswith("dverge: ")]
    assert len(told) == 1, lines
    assert words in told[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--no-such"], "No such option"),
        (["nonsense"], "No such command"),
        (["train", "--recipe", "digit"], "did you mean 'digits'"),
        (["train", "--recipe", "none.toml"], "cannot read recipe"),
        (["train", "--set", "dverge.epoch=1"], "did you mean 'dverge.epochs'"),
        (["train", "--set", "dverge.epochs"], "key=value, e.g. --set dverge.epochs=10"),
        (["train", "--set", "width.x.y=1"], "--set width.x.y: 'width' is not a table"),
        (["train", "--set", "dverge.epochs=0"], "epochs = 0"),
        (["train", "--set", "dverge.epochs=many"], "type int"),
        (["train", "--members", "1"], "2 or more"),
        (["train", "--seed", "4294967296"], "kept for surrogates"),
        (["train", "--set", "architecture=resnet9"], "6n+2"),
        (["train", "--data", "nowhere"], "no folder"),
        (["train", "--device", "tpu"], "auto, cpu or cuda"),
        (["train", "--resume"], "no runs/latest"),
        (["train", "--resume", "--out", "nowhere"], "no run at nowhere"),
        (["export", "model.onnx"], "no run at runs/latest"),
        (["export", "model"], "ending in .onnx"),
        (["verify-robustness"], "no model at model.onnx"),
        (["verify-robustness", "--eps", "big"], "radii"),
        (["verify-robustness", "--eps", "0.1", "--at-eps", "0.2"], "one of --eps"),
        (["verify-robustness", "--threat", "magic"], "transfer, white-box or all"),
        (["verify-robustness", "--preset", "slow"], "quick"),
        (["verify-robustness", "--min-accuracy", "80"], "0 to 1"),
        (["verify-robustness", "--images", "0"], "1 or more"),
        (["predict", "model.onnx", "none.png"], "no file none.png"),
        (["inspect", "model.onnx"], "no model at"),
        (["serve", "model.onnx"], "no model at"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    complains(capsys, arguments, words)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_asked_for_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    complains(capsys, ["train", "--device", "cuda"], "no CUDA GPU")
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in (
        *("train", "demo", "export", "verify-robustness", "replay"),
        *("serve", "predict", "inspect", "bench", "bento"),
    ):
        assert command in listed
        assert run([command, "--help"]) == 0
        assert f"Example: dverge {command}" in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dverge ")


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/locked"), "cannot use /locked"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower batch_size"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_exit_2(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("training.recipe.load_recipe", fail)
    assert run(["train", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


def test_hidden_files_are_no_images(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "deep/b.png"):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        (photos / name).write_bytes(digit.read_bytes())
    (photos / "folder.png").mkdir()
    assert run(["predict", str(tiny_model), str(photos), "--json"]) == 0
    found = [Path(row["image"]).name for row in json.loads(capsys.readouterr().out)]
    assert found == ["a.png", "b.png"]


def test_a_file_name_that_is_not_utf8_does_not_lose_the_answers(
    tiny_model: Path, digit: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"gr\xfcn.png")
    odd.write_bytes(digit.read_bytes())
    answers = tmp_path / "answers.csv"
    assert run(["predict", str(tiny_model), str(odd), "--csv", str(answers)]) == 0
    assert "gr\\udcfcn.png" in answers.read_text(encoding="utf-8")


def test_predict_in_three_forms(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model)
    assert run(["predict", model, str(digit), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["label"] == str(answer["index"])
    (expected,) = Engine(model, device="cpu").predict([digit])
    assert answer["probability"] == expected.probability
    table = tmp_path / "answers.csv"
    assert run(["predict", model, str(tmp_path), "--csv", str(table)]) == 0
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["label"] == answer["label"]
    assert run(["predict", model, str(digit)]) == 0
    assert "digit.png" in capsys.readouterr().out


def test_predict_names_the_unreadable_and_answers_the_rest(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(digit.read_bytes()[:30])
    assert run(["predict", str(tiny_model), str(tmp_path), "--json"]) == 2
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert ["error" in row for row in rows] == [True, False]
    assert "1 of 2 images cannot be read" in captured.err


def test_inspect(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["members"] == 3
    assert facts["robustness"] is None
    assert run(["inspect", str(tiny_model)]) == 0
    assert "no report for this file" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["clean_accuracy", "data", "gates", "verdict"])
def test_inspect_leaves_out_the_figures_of_a_report_that_lacks_a_key(
    key: str, reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = report_path(reported)
    found = json.loads(path.read_text())
    del found[key]
    path.write_text(json.dumps(found))
    assert run(["inspect", str(reported)]) == 0
    said = capsys.readouterr().out
    assert "the report lacks figures" in said
    assert "at eps" not in said
    assert run(["inspect", str(reported), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["robustness"]
    assert set(shown) == {"verdict", "clean_accuracy", "robust_accuracy"} - {key}


def test_the_four_commands_and_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "width=8", "--set", "data.train_limit=320", "--set", "data.test_limit=64"]
    epochs = ["--set", "standard.epochs=2", "--set", "dverge.epochs=1"]
    assert run(["train", *small, *epochs]) == 0
    assert Path("runs/latest").resolve().parent == (tmp_path / "runs").resolve()
    assert run(["train", "--resume", *small, *epochs]) == 0  # finished: nothing to do
    assert run(["train", "--resume"]) == 0  # the settings it was begun with
    assert run(["train", "--resume", "--set", "data.workers=1"]) == 0  # may change on the way
    assert run(["train", "--resume", "--set", "width=16"]) == 2  # other settings
    assert run(["train", "--resume", "--recipe", "digits"]) == 2  # a recipe's: width 16
    assert run(["export", "model.onnx"]) == 0
    gate = ["--eps", "0.1,0.4", "--at-eps", "0.1", "--min-accuracy"]
    assert run(["verify-robustness", *gate, "0.0"]) == 0
    assert "verdict VALID" in capsys.readouterr().out
    assert run(["verify-robustness", *gate, "1.0"]) == 1
    assert "expected at least 1" in capsys.readouterr().err
    assert run(["inspect", "model.onnx"]) == 0
    assert "verified, VALID" in capsys.readouterr().out
    # A control that does not fall: nothing is broken at a tiny radius.
    assert run(["verify-robustness", "--eps", "0.004"]) == 3


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.parametrize("command", ["inspect", "predict"])
def test_using_a_model_needs_neither_torch_nor_the_other_rooms(
    command: str, reported: Path, digit: Path, tmp_path: Path
) -> None:
    """A Bento holds `dverge_serve` alone."""
    arguments = [command, str(reported), *([str(digit)] if command == "predict" else [])]
    done = python(
        "import sys; sys.modules |= dict.fromkeys(['torch', 'training', 'export', 'verification']);"
        f"from dverge_serve.cli import run; sys.exit(run({arguments!r}))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    if command == "inspect":
        assert "95.0% (90.0-100.0)" in done.stdout
        assert "transfer 70.0% (65.0-75.0), white-box 70.0% (65.0-75.0)" in done.stdout


def test_the_package_lists_its_names_without_importing_them(tmp_path: Path) -> None:
    code = "import sys, dverge_serve; assert {'Engine', '__version__'} <= set(dir(dverge_serve));"
    done = python(code + "assert not {'numpy', 'onnxruntime'} & set(sys.modules)", tmp_path)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_heavy_library(tmp_path: Path) -> None:
    done = python(
        "import sys; from dverge_serve.cli import run; run(['--help']);"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'bentoml', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    done = python(
        "import sys; sys.modules['torch'] = None; from dverge_serve.cli import run;"
        "sys.exit(run(['train']))",
        tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "dverge: `dverge train` needs torch, which is not installed; "
        "pip install 'dverge-serve[train]'"
    ]


def test_a_users_own_training_module_does_not_hide_ours(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text("raise SystemExit('the wrong training')")
    done = subprocess.run(
        [sys.executable, "-m", "dverge_serve", "train", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


def test_a_bug_of_ours_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("training.recipe.load_recipe", explode)
    assert run(["train", "--dry-run"]) == 70
    assert "a bug of ours" in capsys.readouterr().err


def test_an_interrupt_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.recipe.load_recipe", interrupt)
    assert run(["train", "--dry-run"]) == 130
    assert capsys.readouterr().err == "dverge: interrupted\n"


def test_a_librarys_parameters_are_shown_as_the_commands_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--version"]) == 0  # registers the commands
    told = as_flags("`at_eps` 0.2 with `device` cpu; `lr`, `dverge export` and `model` stay")
    assert told == "--at-eps 0.2 with --device cpu; `lr`, `dverge export` and `model` stay"
    tiny.save_gray_model(tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    arguments = ["bento", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]
    complains(capsys, arguments, "give another --out")
