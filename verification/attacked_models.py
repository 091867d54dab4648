"""The models under attack: the model itself, an undefended control, and one to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from export.exporter import export
from training.runs.directory import Run
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import find_run, ready
from verification.surrogates import Surrogate, attackable, part_sha256


def find_targets(context: Context) -> tuple[dict[str, Target], str]:
    """Return the models to attack, the model itself first, and what the control is.

    The control is the run's own standard members; without a run, the first surrogate that another
    one, which shares no network with it, can attack.
    """
    gradients, surrogates = context.gradients, context.surrogates
    weights = gradients.weights if gradients else context.engine.card.weights_sha256
    members = gradients.members if gradients else None
    # Of the run, and where gradients come from the file, of the run it was exported from.
    kin = _kin(surrogates, weights) | _kin(surrogates, context.engine.card.weights_sha256)
    targets = {"model": Target(context.engine, members, weights, kin)}
    what = "none"
    if gradients and gradients.run:
        every = range(gradients.run.config.members)
        targets["control"], what = _control(context, gradients.run, "standard", every), "own"
    elif (first := attackable(surrogates)) is not None:
        targets["control"] = _control(context, first.run, "members", first.indices)
        what = first.name
    if (engine := context.against) is not None:
        found = find_run(engine.card, engine.path, None)
        members = [ready(member, context.device) for member in found.members()] if found else None
        weights = engine.card.weights_sha256
        targets["against"] = Target(engine, members, weights, _kin(surrogates, weights))
    return targets, what


@dataclass(frozen=True)
class _Part:
    """Some members of an exported ensemble, as a scorer."""

    engine: Engine
    indices: list[int]

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        found = self.engine.run_all(images).member_logits[:, self.indices]
        return Scores(found.mean(1), found)


def _control(
    context: Context, run: Run, which: Literal["standard", "members"], indices: Sequence[int]
) -> Target:
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        path = Path(folder) / "control.onnx"
        export(run, path, which=which, target="cpu")
        whole = run.members(which)
        members = [ready(whole[index], context.device) for index in indices]
        digest = str(run.checkpoint[f"{which}_sha256"])
        engine = _Part(Engine(path, device="cpu"), list(indices))
    kin = _kin(context.surrogates, digest, indices)
    return Target(engine, members, part_sha256(digest, indices, len(whole)), kin)


def _kin(
    surrogates: Sequence[Surrogate], weights: str, indices: Sequence[int] | None = None
) -> frozenset[str]:
    """Return the hashes of the surrogates that have networks of a run, or of some of it."""
    return frozenset(each.weights for each in surrogates if each.shares(weights, indices))
