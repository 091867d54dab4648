"""What the tests of this room share: a finished run, and a copy of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.training.networks import tiny_config
from training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, the newest of its folder; nobody may change it."""
    out = tmp_path_factory.mktemp("run") / "runs" / "one"
    return train(tiny_config(), out, device=CPU).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "copy"))
