"""The attacks by queries of each preset, all on the same sample of the images."""

from __future__ import annotations

from dataclasses import replace

from training.pgd import Norm
from verification.attacks.attack import Attack
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.query_attack import QueryAttack
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.config import SUBSTITUTE, Preset


def query_attacks(preset: Preset, norm: Norm, scores: bool) -> list[Attack]:
    """Return the attacks of callers: by scores, by labels, and from a stolen model.

    Square has one run for each budget, because its schedule depends on it; searches by labels do
    not, and have one. Square and RayS are Linf attacks; in L2 HopSkipJump takes RayS's place.

    Args:
        preset: its budgets.
        norm: of the balls.
        scores: whether the model gives scores, which Square follows.
    """
    most = max(preset.budgets)
    chosen: list[QueryAttack] = []
    if norm == "linf" and scores:
        chosen += [Square(name=f"square, {each} queries", queries=each) for each in preset.budgets]
    if norm == "linf":
        chosen.append(RayS(name="rays", queries=most))
    if preset.hop_skip_jump or norm == "l2":
        chosen.append(HopSkipJump(name="hop-skip-jump", queries=most))
    stolen = GradientAttack(
        name="mpgd", threat="queries", source=SUBSTITUTE, momentum=1.0, steps=20
    )
    transferred = [
        replace(stolen, name=f"mpgd-{loss} from {SUBSTITUTE}", loss=loss) for loss in ("ce", "cw")
    ]
    return [
        replace(attack, sample=preset.sample, control=False) for attack in (*chosen, *transferred)
    ]
