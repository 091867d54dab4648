"""The models under attack: the model itself, an undefended control, and one to compare with."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dverge_serve.engine.session import Engine
from export.exporter import export
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import find_run, ready


def find_targets(context: Context) -> tuple[dict[str, Target], str]:
    """Return the models to attack, the model itself first, and what the control is.

    The control is the run's own standard members; without a run, the first surrogate, attacked
    from the others.
    """
    found, device = context.gradients, context.device
    targets = {
        "model": Target(
            context.engine,
            found.members if found else None,
            found.weights if found else context.engine.card.weights_sha256,
        )
    }
    control, what = (found.run, "standard") if found and found.run else (None, "members")
    if control is None and len(context.surrogates) > 1:
        control = context.surrogates[0].run
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        if control is not None:
            path = Path(folder) / "control.onnx"
            export(control, path, which="standard" if what == "standard" else "members")
            members = [ready(member, device) for member in control.members(what)]
            weights = str(control.checkpoint[f"{what}_sha256"])
            targets["control"] = Target(Engine(path, device="cpu"), members, weights)
    if context.against is not None:
        targets["against"] = _against(context, context.against)
    if control is None:
        return targets, "none"
    return targets, "own" if what == "standard" else context.surrogates[0].name


def _against(context: Context, engine: Engine) -> Target:
    run = find_run(engine.card, engine.path, None)
    members = [ready(member, context.device) for member in run.members()] if run else None
    return Target(engine, members, engine.card.weights_sha256)
