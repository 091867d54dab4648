"""Every documented extra can be installed by the pip that a new virtual environment brings."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PATIENCE_S = 900  # a resolver that tries every old release takes longer, or gives up


def pip(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [folder / "bin" / "python", "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's layout is POSIX")
def test_all_extras_together_resolve_without_constraints(tmp_path: Path) -> None:
    """None of them alone can need more than all of them together."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ",".join(project["optional-dependencies"])
    venv.create(tmp_path / "new", with_pip=True)
    if pip(tmp_path / "new", "download", "--no-deps", "-d", str(tmp_path), "six").returncode:
        pytest.skip("no package index can be reached")
    found = pip(tmp_path / "new", "install", "--dry-run", f"{PROJECT}[{extras}]")
    assert found.returncode == 0, found.stderr[-2000:]
    assert "Would install" in found.stdout
