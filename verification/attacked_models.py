"""The models under attack: the model itself, an undefended control, and one to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from export.exporter import export
from verification.attacks.target import Target
from verification.context import Context
from verification.control import Control, find_control
from verification.gradients import find_run, ready
from verification.surrogates import Surrogate


def find_targets(context: Context) -> tuple[dict[str, Target], str]:
    """Return the models to attack, the model itself first, and what the control is."""
    gradients, surrogates = context.gradients, context.surrogates
    weights = gradients.weights if gradients else context.engine.card.weights_sha256
    members = gradients.members if gradients else None
    # Of the run, and where gradients come from the file, of the run it was exported from.
    kin = _kin(surrogates, weights) | _kin(surrogates, context.engine.card.weights_sha256)
    targets = {"model": Target(context.engine, members, weights, kin)}
    control = find_control(gradients.run if gradients else None, surrogates)
    if control is not None:
        targets["control"] = _exported(control, context)
    if (engine := context.against) is not None:
        found = find_run(engine.card, engine.path, None)
        members = [ready(member, context.device) for member in found.members()] if found else None
        weights = engine.card.weights_sha256
        targets["against"] = Target(engine, members, weights, _kin(surrogates, weights))
    return targets, control.what if control else "none"


@dataclass(frozen=True)
class _Part:
    """Some members of an exported ensemble, as a scorer."""

    engine: Engine
    indices: list[int]

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        found = self.engine.run_all(images).member_logits[:, self.indices]
        return Scores(found.mean(1), found)


def _exported(control: Control, context: Context) -> Target:
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        path = Path(folder) / "control.onnx"
        export(control.run, path, which=control.which, target="cpu")
        engine = _Part(Engine(path, device="cpu"), list(control.indices))
    strangers = control.strangers(context.surrogates)
    kin = frozenset(each.weights for each in context.surrogates if each not in strangers)
    return Target(engine, control.members(context.device), control.weights, kin)


def _kin(surrogates: Sequence[Surrogate], weights: str) -> frozenset[str]:
    """Return the hashes of the surrogates that have networks of a run."""
    return frozenset(each.weights for each in surrogates if each.shares(weights))
