"""The transfer attacks of each preset: from surrogates, without a query to the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from verification.attacks.gradient_attack import GradientAttack, LossName

NEAREST = 0.15  # of the standing images get the dearer attacks
MPGD = GradientAttack(name="mpgd", threat="transfer", source="a surrogate", momentum=1.0)


def transfer_attacks(
    preset: str,
    surrogates: Sequence[str],
    *,
    parts: Collection[str] = (),
    brief: Collection[str] = (),
    skips: bool = True,
    nearest: float = NEAREST,
    largest: float | None = None,
    dearest: bool = True,
) -> list[GradientAttack]:
    """Return a preset's transfer attacks.

    Args:
        preset: `quick`, `standard` or `full`.
        surrogates: names of the sources.
        parts: surrogates that are some of the networks of another one.
        brief: surrogates without the paper's protocol: single networks, and those that the paper
            does not have.
        skips: whether the surrogates have residual branches (SGM).
        nearest: share of the standing images that get the dearer attacks.
        largest: the only radius of the dearest; by default all.
        dearest: whether these are run at all; without them those on the nearest images are the
            dearest, from whole ensembles alone.
    """
    ensembles = [name for name in surrogates if name not in brief]
    whole = [name for name in surrogates if name not in parts]
    chosen = _fast(surrogates, parts)
    if preset != "quick":
        chosen += _protocol(ensembles, skips)
    chosen += _nearest(surrogates if dearest else whole, whole, nearest, largest, dearest)
    if preset == "full":
        vmi = replace(
            MPGD, name="vmi", steps=10, random_start=False, variance_samples=20, skip_broken=True
        )
        chosen += _from_each(ensembles, vmi)
    return chosen


def _fast(surrogates: Sequence[str], parts: Collection[str]) -> list[GradientAttack]:
    """Return the transfer attacks that break most for each gradient.

    Images break under different networks: a few large steps from each alone, and from small
    ensembles, find more than many steps from all at once. From those of which parts are attacked
    too, cross-entropy finds nothing that the margin does not.
    """
    fast = replace(MPGD, name="mpgd-fast", steps=5, rel_stepsize=0.4)
    both, margin = _from_each(surrogates, fast), _from_each(surrogates, fast, ["cw"])
    return [each for each in both if each in margin or not parts or each.source in parts]


def _nearest(
    surrogates: Sequence[str],
    whole: Sequence[str],
    share: float,
    largest: float | None,
    dearest: bool,
) -> list[GradientAttack]:
    """Return dearer transfer attacks, each of its own kind, on the images nearest to breaking.

    Hardly any other image is broken by them. The control falls without them, or not at all. Random
    sizes (M-DI2) find other images under each network and with each draw. So they are drawn again
    and again, in a few large steps, which find most for each gradient. What the other kinds find is
    little, and mostly at the largest radius. More steps find none.
    """
    one = replace(MPGD, steps=10, skip_broken=True, nearest=share, control=False)
    one = one if dearest else replace(one, only_eps=largest)
    resized = replace(one, name="m-di2-nearest", steps=20, diversity=0.5)
    found = _from_each(surrogates, resized)
    if dearest and share < 1:  # the nearest of these, where they are known
        one = replace(one, nearest=share / 2, only_eps=largest)
        again = replace(resized, nearest=share / 2, steps=5, rel_stepsize=0.4, restarts=6)
        vmi = replace(one, name="vmi-nearest", variance_samples=5)
        found += _from_each(surrogates, replace(again, name="m-di2-fast-nearest"))
        found += _from_each(surrogates, vmi, ["ce"])
    return [
        *found,
        *_from_each(whole, replace(one, name="bsr-nearest", shuffles=4), ["cw"]),
        *_from_each(whole, replace(one, name="mef-nearest", flat_samples=4, momentum=0.5), ["cw"]),
        *_from_each(whole, replace(one, name="pgn-nearest", penalty_samples=2), ["ce"]),
    ]


def _protocol(surrogates: Sequence[str], skips: bool) -> list[GradientAttack]:
    """Return the paper's black-box protocol (4.2): 5 versions an image, surrogate and loss."""
    whole = replace(MPGD, steps=100, restarts=3)
    once = replace(whole, restarts=1, random_start=False)
    chosen = [whole, replace(once, name="m-di2", diversity=0.5)]
    if skips:
        chosen.append(replace(once, name="sgm", skip_gamma=0.2))
    return [attack for each in chosen for attack in _from_each(surrogates, each)]


def _from_each(
    surrogates: Sequence[str], attack: GradientAttack, losses: Sequence[LossName] = ("ce", "cw")
) -> list[GradientAttack]:
    """Return the attack from every surrogate, with each loss."""
    return [
        replace(attack, name=f"{attack.name}-{loss} from {surrogate}", source=surrogate, loss=loss)
        for surrogate in surrogates
        for loss in losses
    ]
