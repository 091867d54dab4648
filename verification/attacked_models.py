"""The models under attack: the model itself, an undefended control, and one to compare with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch

from dverge_serve.engine.session import Engine
from export.exporter import export
from training.runs.directory import Run
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import find_run, ready


def find_targets(context: Context) -> tuple[dict[str, Target], str]:
    """Return the models to attack, the model itself first, and what the control is.

    The control is the run's own standard members; without a run, the first surrogate, attacked
    from the others.
    """
    gradients = context.gradients
    weights = gradients.weights if gradients else context.engine.card.weights_sha256
    targets = {"model": Target(context.engine, gradients.members if gradients else None, weights)}
    what = "none"
    if gradients and gradients.run:
        targets["control"], what = _control(gradients.run, "standard", context.device), "own"
    elif len(context.surrogates) > 1:
        first = context.surrogates[0]
        targets["control"], what = _control(first.run, "members", context.device), first.name
    if (engine := context.against) is not None:
        run = find_run(engine.card, engine.path, None)
        members = [ready(member, context.device) for member in run.members()] if run else None
        targets["against"] = Target(engine, members, engine.card.weights_sha256)
    return targets, what


def _control(run: Run, which: Literal["standard", "members"], device: torch.device) -> Target:
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        path = Path(folder) / "control.onnx"
        export(run, path, which=which, target="cpu")
        members = [ready(member, device) for member in run.members(which)]
        return Target(Engine(path, device="cpu"), members, str(run.checkpoint[f"{which}_sha256"]))
