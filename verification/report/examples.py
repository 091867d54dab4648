"""Attacked test images that the report keeps as pictures, for people to try on the service."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dverge_serve.images import to_float
from training.data.splits import Split
from verification.attacks.outcomes import Outcomes, Pixels
from verification.attacks.target import Target

NAMES = {"model": "answer", "control": "control_answer"}  # targets, and their answers' keys
MOST = 6
MOST_BYTES = 300_000  # of all pictures together, as text: reports travel, and are read whole


def examples(
    outcomes: Mapping[str, Outcomes],
    targets: Mapping[str, Target],
    split: Split,
    labels: Sequence[str],
    eps: Sequence[float],
) -> dict[str, Any] | None:
    """Return the first test images whose transferred versions fool the undefended control.

    They are chosen by what the control answers, never by what the model does: a page that shows
    only what went well would say nothing. The radius is the middle one, or the next larger one at
    which the control is fooled.

    Args:
        outcomes: of the targets by name, `model` and `control` among them.
        targets: by the same names.
        split: the test images, uint8 `[n, C, H, W]`.
        labels: class names.
        eps: the radii.

    Returns:
        `eps` and `images`, each with its `label`, PNG pictures in base64 (`clean`, `attacked`)
        and both models' answers to the attacked one; None where there is no control, or nothing
        fools it.
    """
    if "control" not in targets:
        return None
    control, model = outcomes["control"], outcomes["model"]
    radii = sorted(eps)
    for radius in radii[len(radii) // 2 :]:
        key = (radius, "transfer")
        if key not in control.worst:
            continue
        fooled = np.flatnonzero(control.broken[key] & control.clean & model.clean)[:MOST]
        if len(fooled):
            images = _pictures(control.worst[key], fooled, targets, split, labels)
            return {"eps": radius, "images": images} if images else None
    return None


def _pictures(
    attacked: Pixels,
    chosen: npt.NDArray[np.int64],
    targets: Mapping[str, Target],
    split: Split,
    labels: Sequence[str],
) -> list[dict[str, str]]:
    clean, truth = split.images.cpu().numpy(), split.labels.cpu().numpy()
    changed = to_float(attacked[chosen])
    answers = {name: targets[name].engine.run_all(changed).predictions for name in NAMES}
    found: list[dict[str, str]] = []
    for place, at in enumerate(chosen):
        found.append(
            {
                "label": labels[truth[at]],
                "clean": _png(clean[at]),
                "attacked": _png(attacked[at]),
                **{NAMES[name]: labels[answers[name][place]] for name in NAMES},
            }
        )
        if sum(len(one["clean"]) + len(one["attacked"]) for one in found) > MOST_BYTES:
            return found[:-1]
    return found


def _png(pixels: Pixels) -> str:
    """Return one image `[C, H, W]` as a PNG file in base64."""
    out = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
