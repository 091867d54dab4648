"""The room's Python interface: `from export import export`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import export as room
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export import export


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, export; export.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    assert all(callable(getattr(room, name)) for name in room.__all__)
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        room.exprot  # noqa: B018


def test_a_run_is_given_by_its_folder(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = export(str(tiny_run), str(tmp_path / "model.onnx"), form="grouped", target="cpu")
    assert (done.plan.form, done.plan.target, done.plan.speedups) == ("grouped", "cpu", {})
    assert done.parity.holds
    assert Engine(tmp_path / "model.onnx", device="cpu").card.form == "grouped"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argument", "value", "known"),
    [
        ("which", "control", "members, standard"),
        ("form", "round", "auto, measure, branches, grouped"),
        ("target", "tpu", "auto, cpu, cuda"),
        ("precision", "int4", "fp32, fp16, int8"),
    ],
)
def test_unknown_values_are_refused(
    argument: str, value: str, known: str, tiny_run: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {argument: value}
    with pytest.raises(UserError, match=f"`{argument}` {value}; expected one of {known}"):
        export(tiny_run, tmp_path / "model.onnx", **given)
    assert list(tmp_path.iterdir()) == []
