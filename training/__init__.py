"""Training: members, DVERGE and the run directory.

    from training import load_recipe, train

    run = train(load_recipe("digits", {"dverge.epochs": 20}), "runs/mine")
    logits = run.ensemble()(images)  # [B, C, H, W] in [0, 1] -> [B, K]

Importing this package imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from training.config import Config
    from training.models.ensemble import Ensemble
    from training.recipe import load_recipe
    from training.runs.directory import Run
    from training.trainer import train

__all__ = ["Config", "Ensemble", "Run", "load_ensemble", "load_recipe", "train"]

_MODULES = {
    "Config": "config",
    "Ensemble": "models.ensemble",
    "Run": "runs.directory",
    "load_recipe": "recipe",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ensemble(path: str | Path, device: str | torch.device = "cpu") -> Ensemble:
    """Return the ensemble of a finished run, in evaluation mode; no parameter needs a gradient.

    Args:
        path: the run directory; `runs/latest` may be a link or a text file naming it.
        device: `auto`, `cpu`, `cuda` or a torch device.

    Raises:
        UserError: no finished run there, damaged weights, or no such device.
    """
    from training.device import pick_device
    from training.runs.directory import Run

    return Run.open_finished(path).ensemble().to(pick_device(device))
