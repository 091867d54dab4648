"""Radii for data whose right radius nobody knows: where an undefended control falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dverge_serve.errors import UserError
from dverge_serve.progress import say
from training.config import Config
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.state_dict import network_sha256
from training.pgd import Norm
from training.runs.directory import Run
from verification.attacks.batches import spread
from verification.attacks.gradient_attack import GradientAttack
from verification.gradients import ready
from verification.surrogate import Surrogate, control_among

MOST_IMAGES = 64
MOST_STEPS = 127  # of 255: half the pixel range hides every image


def control_and_sources(
    run: Run | None, surrogates: Sequence[Surrogate], model: Config, device: torch.device
) -> tuple[Sequence[nn.Module], list[Sequence[nn.Module]]]:
    """Return an undefended control and the sources it is attacked from.

    The control is the run's standard members or a surrogate, see `control_among`. The sources are
    all surrogates that share no network with it, or the control itself if there are none.
    """
    first = control_among(surrogates, model, run)
    if first is None and run is not None:
        control: Sequence[Member] = [ready(member, device) for member in run.members("standard")]
        networks = frozenset(map(network_sha256, control))
    else:
        first = first or surrogates[0]
        control, networks = first.members, first.networks
    others = [each.members for each in surrogates if not each.shares(networks)]
    return control, [*others] or [control]


def halving_radii(
    members: Sequence[nn.Module],
    sources: Sequence[Sequence[nn.Module]],
    split: Split,
    norm: Norm,
    seed: int,
    most: int = 0,
) -> tuple[float, ...]:
    """Return half, once and twice the radius at which a control keeps half of its accuracy.

    It is attacked with momentum PGD of 10 steps, from one source after another on what stands. The
    radius is doubled until that halves it, and then found by bisection: a whole number of 8-bit
    steps in Linf, the L2 length of as large a change of every pixel in L2.

    Args:
        members: of the control.
        sources: of the attacks, members each.
        split: test images.
        norm: of the radii.
        seed: of the random starts.
        most: test images that are used, evenly spaced; 0, and never more: `MOST_IMAGES`.

    Raises:
        UserError: the control keeps more than half of its accuracy at every radius.
    """
    part = split.take(spread(split, MOST_IMAGES, most))
    images, labels = to_float(part.images), part.labels
    control = Ensemble(members).eval()
    attack = GradientAttack(
        name="radius", threat="transfer", source="a surrogate", norm=norm, momentum=1.0, steps=10
    )
    unit = 1 / 255 if norm == "linf" else images[0].numel() ** 0.5 / 255

    def right(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answers: torch.Tensor = control(x).argmax(1)
        return answers == y

    clean = right(images, labels)

    def halved(steps: int) -> bool:
        say(f"looking for the radius at which the control is halved: trying {unit * steps:.3g}")
        kept = clean.nonzero()[:, 0]
        for at, source in enumerate(sources):
            if 2 * len(kept) <= clean.sum():
                break
            x, y = images[kept], labels[kept]
            made = attack.run(Ensemble(source).eval(), x, y, unit * steps, seed, at)
            kept = kept[right(made.images, y)]
        return bool(2 * len(kept) <= clean.sum())

    low, high = 0, 1
    while not halved(high):
        if high == MOST_STEPS:
            raise UserError(
                f"`eps` auto: the control keeps more than half of its accuracy even at "
                f"{unit * high:.3g}",
                "surrogates whose attacks transfer",
                "give `eps` radii yourself, or better `surrogates`",
            )
        low, high = high, min(2 * high, MOST_STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if halved(middle) else (middle, high)
    steps = sorted({max(1, high // 2), high, 2 * high})
    found = tuple(unit * each if norm == "l2" else each / 255 for each in steps)
    say(f"`eps` auto: the control is halved at {found[steps.index(high)]:.3g}")
    return found
