"""The transfer attacks of each preset: from surrogates, without a query to the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from verification.attacks.gradient_attack import GradientAttack, LossName

NEAREST = 0.2  # of the standing images get the dearer attacks
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
            dearest, from whole ensembles alone, which are the only sources of cross-entropy, too.
    """
    ensembles = [name for name in surrogates if name not in brief]
    whole = [name for name in surrogates if name not in parts]
    chosen = _fast(surrogates if dearest else whole)
    if not dearest:
        chosen += _fast([name for name in surrogates if name in parts], ["cw"])
    if preset != "quick":
        chosen += _protocol(ensembles, skips)
    singles = surrogates if dearest else whole
    chosen += _nearest(singles, whole, nearest, largest, dearest)
    if preset == "full":
        vmi = replace(
            MPGD, name="vmi", steps=10, random_start=False, variance_samples=20, skip_broken=True
        )
        chosen += _from_each(ensembles, vmi)
    return chosen


def _fast(
    surrogates: Sequence[str], losses: Sequence[LossName] = ("ce", "cw")
) -> list[GradientAttack]:
    """Return the transfer attacks that break most for each gradient.

    Images break under different networks: a few large steps from each alone, and from small
    ensembles, find more than many steps from all at once.
    """
    fast = replace(MPGD, name="mpgd-fast", steps=5, rel_stepsize=0.4)
    return _from_each(surrogates, fast, losses)


def _nearest(
    surrogates: Sequence[str],
    ensembles: Sequence[str],
    share: float,
    largest: float | None,
    dearest: bool,
) -> list[GradientAttack]:
    """Return dearer transfer attacks, each of its own kind, on the images nearest to breaking.

    Hardly any other image is broken by them. The control falls without them, or not at all. Random
    sizes (M-DI2) and neighbours (VMI) find other images under each network; the rest finds them
    under the largest ensemble. More steps of plain momentum find none.
    """
    one = replace(MPGD, steps=10, skip_broken=True, nearest=share, control=False)
    one = one if dearest else replace(one, only_eps=largest)
    bsr = replace(one, name="bsr-nearest", shuffles=4)
    mef = replace(one, name="mef-nearest", flat_samples=4, momentum=0.5)
    pgn = replace(one, name="pgn-nearest", penalty_samples=2)
    found = [
        *_from_each(surrogates, replace(one, name="m-di2-nearest", steps=20, diversity=0.5)),
        *_from_each(ensembles, bsr, ["cw"]),
        *_from_each(ensembles, mef, ["cw"]),
        *_from_each(ensembles, pgn, ["ce"]),
    ]
    if dearest and share < 1:  # the nearest of these, where they are known
        one = replace(one, nearest=share / 2, restarts=2, only_eps=largest)
        long = replace(one, name="m-di2-long-nearest", steps=50, diversity=0.5)
        vmi = replace(one, name="vmi-nearest", variance_samples=5)
        found += [*_from_each(surrogates, long), *_from_each(surrogates, vmi, ["ce"])]
    return found


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
