"""The presets: the attacks of `quick`, `standard` and `full`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from training.pgd import Norm
from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import JSON_FORM, Attack, ReportedAttack
from verification.attacks.autoattack import AutoAttack
from verification.attacks.gradient_attack import GradientAttack, LossName, Noise, OutputName
from verification.attacks.square import Square
from verification.config import PRESETS

CYCLES = 6  # of white-box rounds, at most
LARGE_EPS = {"linf": 0.5, "l2": 0.5}  # L2: of the way across the whole box
ATTACK_KINDS: tuple[type[Attack], ...] = (Noise, GradientAttack, AdaptivePGD, Square, AutoAttack)
MPGD = GradientAttack(name="mpgd", threat="transfer", source="a surrogate", momentum=1.0)
PGD = GradientAttack(name="pgd", threat="white_box", source="target")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A preset on one model.

    Args:
        preset: `quick`, `standard` or `full`.
        norm: of every ball. Square is an Linf attack and is left out of the others.
        classes: DLR needs three.
        skips: whether the surrogates have residual branches (SGM).
        reference: whether pyautoattack is installed.
    """

    preset: str
    classes: int
    norm: Norm = "linf"
    skips: bool = True
    reference: bool = False


def left_out(variant: Variant) -> dict[str, str]:
    """Return the attacks of the preset that this model does not get, and why."""
    preset = variant.preset
    whole = preset != "quick"
    square = PRESETS[preset].square_queries > 0
    missing = "pyautoattack is not installed: pip install 'dverge-serve[audit]'"
    found = {
        "SGM": (whole and not variant.skips, "a surrogate has no residual branches"),
        "DLR": (variant.classes < 3, "it needs three classes"),
        "targeted DLR": (variant.classes < 4, "it needs four classes"),
        "AutoAttack": (preset == "full" and not variant.reference, missing),
        "Square": (square and variant.norm != "linf", "it is an Linf attack"),
    }
    return {what: why for what, (is_left_out, why) in found.items() if is_left_out}


def suite(variant: Variant, surrogates: Sequence[str]) -> list[Attack]:
    """Return a preset's attacks.

    Args:
        variant: the preset, and what the model allows of it.
        surrogates: names of the sources of transfer attacks.
    """
    preset, norm = variant.preset, variant.norm
    chosen: list[Attack] = [
        Noise(name="noise", threat="transfer", source="none"),
        replace(
            PGD,
            name="fgsm-ce on mean-logits",
            steps=1,
            rel_stepsize=1.0,
            random_start=False,
            control=False,
        ),
    ]
    if preset == "quick":
        chosen += _quick(surrogates)
        chosen += _rounds(variant.classes, steps=10, nearest_steps=50, targets=2)
    else:
        chosen += _transfer_protocol(surrogates, variant.skips)
        chosen += _white_box_protocol(variant.classes)
        chosen += _rounds(variant.classes, steps=20, nearest_steps=100, targets=9)
    if preset == "full":
        chosen += _full(surrogates, variant.reference)
    queries = PRESETS[preset].square_queries
    if queries and norm == "linf":
        chosen.append(
            Square(
                name="square",
                threat="queries",
                source="target",
                queries=queries,
                skip_broken=True,
                control=False,
            )
        )
    return [replace(attack, norm=norm) for attack in chosen]


def large(norm: Norm, pixels: int) -> tuple[GradientAttack, float]:
    """Return the attack, and its radius, that must leave no more than chance.

    Half the pixel range lets every image become the same grey one.
    """
    attack = replace(
        PGD,
        name="pgd-cw at a radius that hides the image",
        loss="cw",
        norm=norm,
        steps=20,
        control=False,
        gate="reaches-chance",
    )
    return attack, LARGE_EPS[norm] * (1 if norm == "linf" else pixels**0.5)


def from_json(tables: Sequence[dict[str, Any]]) -> list[Attack]:
    """Return the suite that a report describes.

    Args:
        tables: each as `Attack.to_json` gives it.
    """
    return [_read(table) for table in tables]


def _read(table: dict[str, Any]) -> Attack:
    kind = next((each for each in ATTACK_KINDS if each.kind == table["kind"]), ReportedAttack)
    if kind is GradientAttack and table["loss"] not in get_args(LossName):  # a loss of one's own
        kind = ReportedAttack
    known = {field.name for field in fields(kind)}
    settings = {JSON_FORM[key][0]: value for key, value in table.items() if key in JSON_FORM}
    return kind(**{name: value for name, value in settings.items() if name in known})


def _quick(surrogates: Sequence[str]) -> list[GradientAttack]:
    """Return momentum PGD from every surrogate with both losses, and white-box PGD.

    On both ways of combining the members, because a saturated softmax hides the gradient. The
    rounds do the rest.
    """
    return [
        *_from_each(surrogates, replace(MPGD, steps=20, restarts=2)),
        *_on_each([("ce", "mean-logits"), ("cw", "mean-logits")], PGD),
        *_on_each([("ce", "mean-softmax")], replace(PGD, control=False)),
    ]


def _transfer_protocol(surrogates: Sequence[str], skips: bool) -> list[GradientAttack]:
    """Return the paper's black-box protocol (4.2): 5 versions an image, surrogate and loss."""
    whole = replace(MPGD, steps=100, restarts=3)
    once = replace(whole, restarts=1, random_start=False)
    chosen = [whole, replace(once, name="m-di2", diversity=0.5)]
    if skips:
        chosen.append(replace(once, name="sgm", skip_gamma=0.2))
    return [attack for each in chosen for attack in _from_each(surrogates, each)]


def _white_box_protocol(classes: int) -> list[GradientAttack]:
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

    A cycle that breaks almost nothing is the last. The control, which falls early, gets the first
    two rounds.
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
    return [
        replace(
            each,
            name=f"apgd-{each.loss}, cycle {cycle}",
            control=cycle == 1 and each.loss in ("ce", "cw"),
        )
        for cycle in range(1, CYCLES + 1)
        for each in chosen
    ]


def _from_each(surrogates: Sequence[str], attack: GradientAttack) -> list[GradientAttack]:
    """Return the attack from every surrogate, with both losses."""
    losses: tuple[LossName, ...] = ("ce", "cw")
    return [
        replace(attack, name=f"{attack.name}-{loss} from {surrogate}", source=surrogate, loss=loss)
        for surrogate in surrogates
        for loss in losses
    ]


def _on_each(
    forms: Sequence[tuple[LossName, OutputName]], attack: GradientAttack
) -> list[GradientAttack]:
    """Return the attack with every loss on every way of combining the members named."""
    return [
        replace(attack, name=f"{attack.name}-{loss} on {output}", loss=loss, output=output)
        for loss, output in forms
    ]


def _full(surrogates: Sequence[str], reference: bool) -> list[Attack]:
    """Return what `full` adds: VMI, the re-weighted members and AutoAttack."""
    vmi = replace(
        MPGD, name="vmi", steps=10, random_start=False, variance_samples=20, skip_broken=True
    )
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
    return [*_from_each(surrogates, vmi), reweighted, *([published] if reference else [])]
