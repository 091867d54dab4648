"""The command line: every user mistake is one line and exit code 2; every code of the contract."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dverge_serve import __version__
from dverge_serve.cli import as_flags, run
from dverge_serve.engine.report import Report
from tests.cli.running import complains, python
from tests.serving import tiny
from tests.verification.report.test_page import table


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
        (["train", "--set", "dverge.epochs=many"], "a whole number"),
        (["train", "--set", "data.resize=112"], "a pair such as [32, 32]"),
        (["train", "--set", "data.mean=1"], "a list such as [0.5, 0.5, ...]"),
        (["train", "--set", "data.flip=1"], "true or false"),
        (["train", "--members", "1"], "2 to 1000"),
        (["train", "--members", "100000000"], "2 to 1000"),
        (["train", "--set", "width=100000"], "width = 100000"),
        (["train", "--set", f"batch_size={10**20}"], "a whole number below"),
        (["train", "--set", f"standard.epochs={10**23}"], "a whole number below"),
        (["train", "--set", "name=../../x"], "a name for a folder"),
        (["train", "--recipe", "../../x"], "unknown recipe"),
        (["train", "--data", "x" * 5000], "File name too long"),
        (["predict", "model.onnx", "x.png", "--csv", "no/where.csv"], "no folder no for --csv"),
        (["cache", "prune", "--days", "-1"], "0 or more"),
        (["cache", "prune", "nothing"], "no part 'nothing'"),
        (["train", "--seed", "4294967296"], "kept for surrogates"),
        (["train", "--set", "architecture=resnet9"], "6n+2"),
        (["train", "--data", "nowhere"], "no folder"),
        (["train", "--device", "tpu"], "auto, cpu or cuda"),
        (["train", "--resume"], "no runs/latest"),
        (["train", "--resume", "--out", "nowhere"], "no run at nowhere"),
        (["export", "model.onnx"], "no run at runs/latest"),
        (["export", "model"], "ending in .onnx"),
        (["verify-robustness"], "no model at model.onnx"),
        (["verify-robustness", "--eps", "big"], "8/255 or auto"),
        (
            ["verify-robustness", "--eps", "8"],
            "above 0 and at most 1 with commas",
        ),
        (["verify-robustness", "--at-eps", "8/0"], "--at-eps '8/0'"),
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


def test_no_summary_of_a_command_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["cache"]):
        assert run([*group, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dverge {__version__}\n"
    assert run(["--version", "-v"]) == 0
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["dverge"] == __version__
    assert {"torch", "torchvision", "onnx", "bentoml"} < told.keys()
    assert any(name.startswith("onnxruntime") for name in told)


def test_settings_of_a_service_are_called_what_the_user_called_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    model = str(tmp_path / "model.onnx")
    for flag, value in (("--workers", "0"), ("--device", "tpu")):
        complains(capsys, ["serve", model, flag, value], f"{flag} is '{value}'")
    monkeypatch.setenv("DVERGE_WORKERS", "0")
    complains(capsys, ["serve", model], "DVERGE_WORKERS is '0'")


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["-v"]):
        assert run(words) == 0
        assert "verify-robustness" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "verify-robustness"])
def test_every_option_of_a_long_help_is_in_a_panel(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    told = capsys.readouterr().out
    other = told.partition("\nOther:\n")[2].partition("\n\n")[0]
    assert other.split()[0] == "--help"
    assert other.count("--") == 1
    for title in ("Data", "Method", "Hardware", "Output"):
        assert f"\n{title}:\n" in told


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/locked"), "cannot use /locked"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), "full; lower batch_size, or use --device"),
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


def test_memory_of_the_device_is_full_and_there_is_no_batch_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("verification.verify", fail)
    assert run(["verify-robustness", "model.onnx"]) == 2
    assert capsys.readouterr().err == "dverge: the device's memory is full; use --device cpu\n"


def test_the_four_commands_and_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "width=8", "--set", "data.train_limit=320", "--set", "data.test_limit=64"]
    epochs = ["--set", "standard.epochs=4", "--set", "dverge.epochs=1"]
    assert run(["train", *small, *epochs]) == 0
    assert Path("runs/latest").resolve().parent == (tmp_path / "runs").resolve()
    assert run(["train", "--resume", *small, *epochs]) == 0  # finished: nothing to do
    assert run(["train", "--resume"]) == 0  # the settings it was begun with
    assert run(["train", "--resume", "--set", "data.workers=1"]) == 0  # may change on the way
    assert run(["train", "--resume", "--set", "width=16"]) == 2  # other settings
    assert run(["train", "--resume", "--recipe", "digits"]) == 2  # a recipe's: width 16
    assert run(["export", "model.onnx"]) == 0
    gate = ["--eps", "0.1,102/255", "--at-eps", "0.1", "--min-accuracy"]
    assert run(["verify-robustness", *gate, "0.0"]) == 0
    told = capsys.readouterr().out
    assert "verdict VALID" in told
    assert "102/255 = 0.4" in told
    assert run(["verify-robustness", *gate, "1.0"]) == 1
    assert "expected at least 1" in capsys.readouterr().err
    assert run(["inspect", "model.onnx"]) == 0
    assert "verified, VALID" in capsys.readouterr().out
    # A control that does not fall: nothing is broken at a tiny radius.
    capsys.readouterr()
    assert run(["verify-robustness", "--eps", "1/255"]) == 3
    *_, verdict, failed, step = capsys.readouterr().out.splitlines()
    assert verdict == "verdict INCONCLUSIVE"
    assert failed.startswith("control-falls failed: at eps 1/255 = 0.00392")
    assert step.startswith("  what to do: use --eps auto")


def test_a_verification_names_its_page_and_junit_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("verification.verify", lambda *_, **__: Report.from_json(table()))
    assert run(["verify-robustness", "m.onnx", "--junit", "checks.xml"]) == 0
    assert "report in m.report.json and m.report.html" in capsys.readouterr().out
    assert "give the --run" in Path("checks.xml").read_text()


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


def test_a_line_is_short_and_obeys_no_escape_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "model.onnx", "\x1b[31m" + "x" * 10_000]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "cannot use ?[31mxxx" in told
    assert len(told) < 500


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_full_memory_is_told_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("training.recipe.load_recipe", full)
    complains(capsys, ["train", "--recipe", "digits"], "lower batch_size, width or members")


def test_any_name_can_be_printed_on_any_terminal(
    tiny_model: Path, digit: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "é😀.png"
    odd.write_bytes(digit.read_bytes())
    arguments = [sys.executable, "-m", "dverge_serve", "predict", str(tiny_model), str(odd)]
    ascii_only = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    found = subprocess.run(arguments, capture_output=True, check=False, env=ascii_only)
    assert found.returncode == 0, found.stderr


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
