"""The models under attack: the model itself, an undefended control, and one to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from export.exporter import export
from export.source import ExportSource, from_run
from training.models.member import Member
from training.models.state_dict import network_sha256
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import find_run, ready
from verification.surrogate import Surrogate, control_among, part_sha256


def find_targets(context: Context) -> tuple[dict[str, Target], str]:
    """Return the models to attack, the model itself first, and what the control is.

    The control is the run's own standard members, or a surrogate, see `control_among`.
    """
    gradients, surrogates = context.gradients, context.surrogates
    weights = gradients.weights if gradients else context.engine.card.weights_sha256
    members = gradients.members if gradients else None
    # Where the networks are not known, by the hash of the run that the file was exported from.
    kin = _kin(surrogates, members or (), context.engine.card.weights_sha256)
    targets = {"model": Target(context.engine, members, weights, kin)}
    what = "none"
    run = gradients.run if gradients else None
    if (first := control_among(surrogates, context.training, run)) is not None:
        targets["control"] = _control(context, first.origin.source(), first.indices)
        what = first.name
    elif run is not None:
        standard = from_run(run, "standard")
        targets["control"], what = _control(context, standard, range(len(standard.ensemble))), "own"
    if (engine := context.against) is not None:
        found = find_run(engine.card, engine.path, None)
        members = [ready(member, context.device) for member in found.members()] if found else None
        weights = engine.card.weights_sha256
        targets["against"] = Target(
            engine, members, weights, _kin(surrogates, members or (), weights)
        )
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


def _control(context: Context, source: ExportSource, indices: Sequence[int]) -> Target:
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        path = Path(folder) / "control.onnx"
        export(source, path, target="cpu")
        engine = _Part(Engine(path, device="cpu", spinning=False), list(indices))
    whole = [member for member in source.ensemble if isinstance(member, Member)]
    members = [ready(whole[index], context.device) for index in indices]
    weights = part_sha256(source.card.weights_sha256, indices, len(whole))
    return Target(engine, members, weights, _kin(context.surrogates, members))


def _kin(
    surrogates: Sequence[Surrogate], members: Sequence[nn.Module], origin: str = ""
) -> frozenset[str]:
    """Return the hashes of the surrogates with any of these networks, or of that origin."""
    own = {network_sha256(member) for member in members}
    return frozenset(
        each.weights for each in surrogates if each.shares(own) or each.origin.sha256 == origin
    )
