"""Trained ensembles from run directories."""

from __future__ import annotations

from pathlib import Path

import torch

from training.device import pick_device
from training.models.ensemble import Ensemble
from training.runs.directory import Run


def load_ensemble(path: str | Path, device: str | torch.device = "cpu") -> Ensemble:
    """Return the ensemble of a finished run, in evaluation mode; no parameter needs a gradient.

    Args:
        path: the run directory; `runs/latest` may be a link or a text file naming it.
        device: `auto`, `cpu`, `cuda` or a torch device.

    Raises:
        UserError: no finished run there, damaged weights, or no such device.
    """
    return Run.open_finished(path).ensemble().to(pick_device(device))
