"""Ways to run the command line: for its one line of complaint, or in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dverge_serve.cli import run


def complains(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    capsys.readouterr()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    told = [line for line in lines if line.startswith("dverge: ")]
    assert len(told) == 1, lines
    assert words in told[0]


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
