"""An ensemble of digits members, and the images it is attacked on."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from training.data.splits import load_test, to_float
from training.models.ensemble import Ensemble
from training.runs.directory import Run


@pytest.fixture(scope="session")
def ensemble(tiny_run: Path) -> Ensemble:
    """The members of the tiny run as one module, in evaluation mode."""
    return Ensemble(Run.open_finished(tiny_run).members()).eval()


@pytest.fixture(scope="session")
def batch(tiny_run: Path) -> tuple[Tensor, Tensor]:
    """Its 64 test images, float32 `[64, 1, 8, 8]` in `[0,1]`, and their labels."""
    _, split = load_test(Run.open_finished(tiny_run).config.data)
    return to_float(split.images), split.labels
