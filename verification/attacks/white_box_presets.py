"""The white-box attacks of each preset: with the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from verification.attacks.annealed import AnnealedPGD
from verification.attacks.apgd import NEAREST, AdaptivePGD
from verification.attacks.attack import Attack
from verification.attacks.autoattack import AutoAttack
from verification.attacks.gradient_attack import GradientAttack, LossName, OutputName

CYCLES = 6  # of rounds, at most
SAMPLE = 80  # images, those included that do not stand
PGD = GradientAttack(name="pgd", threat="white_box", source="target")


def white_box_attacks(
    preset: str,
    classes: int,
    *,
    reference: bool = False,
    largest: float | None = None,
    dearest: bool = True,
) -> list[Attack]:
    """Return a preset's white-box attacks: weak ones first, then rounds on what stands.

    Args:
        preset: `quick`, `standard` or `full`.
        classes: DLR needs three, its targeted form four.
        reference: whether pyautoattack is installed.
        largest: radius, where it is known: the only one of annealed PGD in `quick`.
        dearest: whether all weak attacks of `quick` run at every radius, not at `largest` alone.
    """
    chosen: list[Attack] = []
    if preset == "quick":
        # Both ways of combining the members, in case a saturated softmax hides the gradient.
        forms: list[tuple[LossName, OutputName]]
        forms = [("ce", "mean-logits"), ("cw", "mean-logits"), ("ce", "mean-softmax")]
        weak = replace(PGD, steps=5, rel_stepsize=0.4, control=False)
        chosen += _on_each(forms[:1], weak)
        chosen += _on_each(forms[1:], replace(weak, only_eps=None if dearest else largest))
        chosen += _rounds(classes, steps=10, nearest_steps=50, targets=2)
        chosen += _annealed(largest)
    else:
        chosen += _protocol(classes)
        chosen += _rounds(classes, steps=20, nearest_steps=100, targets=9)
        chosen += _annealed(None)
    if preset == "full":
        chosen += _whole(reference)
    return chosen


def _protocol(classes: int) -> list[GradientAttack]:
    """Return the paper's white-box protocol on all forms of the ensemble: PGD-50, 5 starts."""
    forms: list[tuple[LossName, OutputName]] = [
        ("ce", "mean-softmax"),
        ("ce", "mean-logits"),
        ("cw", "mean-logits"),
        ("ce", "logsumexp"),
    ]
    if classes >= 3:
        forms.append(("dlr", "mean-logits"))
    return _on_each(forms, replace(PGD, steps=50, restarts=5))


def _rounds(classes: int, steps: int, nearest_steps: int, targets: int) -> list[AdaptivePGD]:
    """Return cycles of Auto-PGD over the losses, on what still stands.

    The later cycles go on with the images that came nearest to a wrong answer. A cycle that breaks
    almost nothing is the last. The control, which falls early, gets the first round.
    """
    one = AdaptivePGD(
        name="apgd",
        threat="white_box",
        source="target",
        steps=steps,
        nearest_steps=nearest_steps,
        skip_broken=True,
        gate="converged",
    )
    chosen = [replace(one, loss="ce"), replace(one, loss="cw")]
    if classes >= 3:
        chosen.append(replace(one, loss="dlr"))
    if classes >= 4:
        chosen.append(replace(one, loss="targeted", targets=min(targets, classes - 1)))
    first = [
        replace(each, name=f"apgd-{each.loss}, cycle 1", control=each.loss == "ce")
        for each in chosen
    ]
    return first + [
        replace(
            each,
            name=f"apgd-{each.loss}, cycle {cycle}",
            steps=nearest_steps,
            nearest_steps=0,
            nearest=NEAREST,
            control=False,
        )
        for cycle in range(2, CYCLES + 1)
        for each in chosen
    ]


def _annealed(only_eps: float | None) -> list[AnnealedPGD]:
    """Return rounds of annealed PGD: on some of what stands, and on all of it if one falls.

    They break nothing where the scores are smooth; where they are not, Auto-PGD ends too early,
    and so do short rounds.
    """
    one = AnnealedPGD(
        name="annealed-cw, round 1",
        threat="white_box",
        source="target",
        loss="cw",
        steps=100,
        sample=SAMPLE,
        skip_broken=True,
        gate="converged",
        control=False,
        only_eps=only_eps,
    )
    whole = replace(one, sample=0, steps=300, restarts=2)
    more = range(2, CYCLES + 1)
    return [one, *(replace(whole, name=f"annealed-cw, round {number}") for number in more)]


def _whole(reference: bool) -> list[Attack]:
    """Return what `full` adds: the re-weighted members and AutoAttack."""
    reweighted = replace(
        PGD,
        name="reweighted members",
        loss="reweighted",
        steps=100,
        rel_stepsize=0.1,
        momentum=0.75,
        restarts=5,
        skip_broken=True,
    )
    published = AutoAttack(
        name="autoattack", threat="white_box", source="target", skip_broken=True, control=False
    )
    return [reweighted, *([published] if reference else [])]


def _on_each(
    forms: Sequence[tuple[LossName, OutputName]], attack: GradientAttack
) -> list[GradientAttack]:
    """Return the attack with every loss on every way of combining the members named."""
    return [
        replace(attack, name=f"{attack.name}-{loss} on {output}", loss=loss, output=output)
        for loss, output in forms
    ]
