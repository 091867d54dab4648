"""Radii for data whose right radius nobody knows: where an undefended control falls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dverge_serve.errors import UserError
from dverge_serve.progress import say
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.pgd import Norm
from training.runs.directory import Run
from verification.attacks.gradient_attack import GradientAttack
from verification.control import find_control
from verification.surrogates import Surrogate

MOST_IMAGES = 64
MOST_STEPS = 127  # of 255: half the pixel range hides every image


def control_and_sources(
    run: Run | None, surrogates: Sequence[Surrogate], device: torch.device
) -> tuple[Sequence[nn.Module], list[Sequence[nn.Module]]]:
    """Return an undefended control and the sources it is attacked from.

    The sources are all surrogates that share no network with it. If there are none, it is attacked
    with its own weights; without a run it is then the first surrogate.
    """
    control = find_control(run, surrogates)
    if control is None:
        return surrogates[0].members, [surrogates[0].members]
    members = control.members(device)
    return members, [each.members for each in control.strangers(surrogates)] or [members]


def halving_radii(
    members: Sequence[nn.Module],
    sources: Sequence[Sequence[nn.Module]],
    split: Split,
    norm: Norm,
    seed: int,
) -> tuple[float, ...]:
    """Return half, once and twice the radius at which a control keeps half of its accuracy.

    It is attacked with momentum PGD of 10 steps. The radius is found by bisection: a whole number
    of 8-bit steps in Linf, the L2 length of as large a change of every pixel in L2.

    Args:
        members: of the control.
        sources: of the attacks, members each.
        split: test images; `MOST_IMAGES` of them are used, evenly spaced.
        norm: of the radii.
        seed: of the random starts.

    Raises:
        UserError: the control keeps more than half of its accuracy at every radius.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, MOST_IMAGES).round().astype(np.int64))
    part = split.take(torch.from_numpy(rows).to(split.device))
    images, labels = to_float(part.images), part.labels
    control = Ensemble(members).eval()
    attack = GradientAttack(
        name="radius", threat="transfer", source="a surrogate", norm=norm, momentum=1.0, steps=10
    )
    unit = 1 / 255 if norm == "linf" else images[0].numel() ** 0.5 / 255

    def right(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answers: torch.Tensor = control(x).argmax(1)
        return answers == labels

    clean = right(images)

    def halved(steps: int) -> bool:
        kept = clean
        for at, source in enumerate(sources):
            made = attack.run(Ensemble(source).eval(), images, labels, unit * steps, seed, at)
            kept = kept & right(made.images)
        return bool(kept.sum() <= clean.sum() / 2)

    low, high = 0, MOST_STEPS
    if not halved(high):
        raise UserError(
            f"`eps` auto: the control keeps more than half of its accuracy even at "
            f"{unit * high:.3g}",
            "surrogates whose attacks transfer",
            "give `eps` radii yourself, or better `surrogates`",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if halved(middle) else (middle, high)
    steps = sorted({max(1, high // 2), high, 2 * high})
    found = tuple(unit * each if norm == "l2" else each / 255 for each in steps)
    say(f"`eps` auto: the control is halved at {found[steps.index(high)]:.3g}")
    return found
