"""The presets: the attacks of `quick`, `standard` and `full`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from training.pgd import Norm
from verification.attacks.annealed import AnnealedPGD
from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import JSON_FORM, Attack, ReportedAttack
from verification.attacks.autoattack import AutoAttack
from verification.attacks.gradient_attack import GradientAttack, LossName, Noise
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.query_attack import ReportedQueryAttack
from verification.attacks.query_presets import query_attacks
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.attacks.transfer_presets import NEAREST, transfer_attacks
from verification.attacks.universal_patterns import UniversalPatterns
from verification.attacks.value_grid import GridAttack, InkAttack
from verification.attacks.white_box_presets import PGD, white_box_attacks
from verification.config import PRESETS, Preset

LARGE_EPS = {"linf": 0.5, "l2": 0.5}  # L2: of the way across the whole box
ATTACK_KINDS: tuple[type[Attack], ...] = (
    Noise,
    UniversalPatterns,
    GradientAttack,
    AdaptivePGD,
    AnnealedPGD,
    GridAttack,
    InkAttack,
    Square,
    RayS,
    HopSkipJump,
    AutoAttack,
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A preset on one model.

    Args:
        preset: `quick`, `standard` or `full`.
        norm: of every ball. Square and RayS are Linf attacks and are left out of the others.
        classes: DLR needs three.
        skips: whether the surrogates have residual branches (SGM).
        parts: surrogates that are some of the networks of another one.
        brief: surrogates without the paper's protocol: single networks, and those that the paper
            does not have.
        reference: whether pyautoattack is installed.
        scores: whether the model gives scores, which Square follows.
        size: of the preset on images like these; by default on small ones.
        largest: radius, where it is known: the dearest transfer attacks run at it alone.
    """

    preset: str
    classes: int
    norm: Norm = "linf"
    skips: bool = True
    parts: frozenset[str] = frozenset()
    brief: frozenset[str] = frozenset()
    reference: bool = False
    scores: bool = True
    size: Preset | None = None
    largest: float | None = None


def left_out(variant: Variant) -> dict[str, str]:
    """Return the attacks of the preset that this model does not get, and why."""
    preset = variant.preset
    whole = preset != "quick"
    missing = "pyautoattack is not installed: pip install 'dverge-serve[audit]'"
    found = {
        "SGM": (whole and not variant.skips, "a surrogate has no residual branches"),
        "DLR": (variant.classes < 3, "it needs three classes"),
        "targeted DLR": (variant.classes < 4, "it needs four classes"),
        "AutoAttack": (preset == "full" and not variant.reference, missing),
        "Square, RayS": (variant.norm != "linf", "they are Linf attacks"),
        "Square": (not variant.scores, "it follows scores, the model gives labels alone"),
    }
    return {what: why for what, (is_left_out, why) in found.items() if is_left_out}


def suite(variant: Variant, surrogates: Sequence[str]) -> list[Attack]:
    """Return a preset's attacks.

    Args:
        variant: the preset, and what the model allows of it.
        surrogates: names of the sources of transfer attacks.
    """
    preset, norm = variant.preset, variant.norm
    size = variant.size or PRESETS[preset]
    chosen: list[Attack] = [
        Noise(name="noise", threat="transfer", source="none"),
        UniversalPatterns(name="universal patterns", control=size.dearest),
        replace(
            PGD,
            name="fgsm-ce on mean-logits",
            steps=1,
            rel_stepsize=1.0,
            random_start=False,
            control=False,
        ),
    ]
    chosen += transfer_attacks(
        preset,
        surrogates,
        parts=variant.parts,
        brief=variant.brief,
        skips=variant.skips,
        # Labels alone do not say which images are near.
        nearest=NEAREST if variant.scores else 1.0,
        largest=variant.largest,
        dearest=size.dearest,
    )
    chosen += white_box_attacks(
        preset,
        variant.classes,
        reference=variant.reference,
        largest=variant.largest,
        dearest=size.dearest,
    )
    chosen += query_attacks(size, norm, variant.scores)
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
    own_loss = issubclass(kind, GradientAttack) and table["loss"] not in get_args(LossName)
    if kind is ReportedAttack or own_loss:
        kind = ReportedQueryAttack if table["queries"] else ReportedAttack
    known = {field.name for field in fields(kind)}
    settings = {JSON_FORM[key][0]: value for key, value in table.items() if key in JSON_FORM}
    settings["levels"] = tuple(settings.get("levels", ()))
    return kind(**{name: value for name, value in settings.items() if name in known})
