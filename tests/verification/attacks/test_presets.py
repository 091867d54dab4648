"""The presets: their protocol, and that every kind of attack in them works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.verification.models import (
    EPS,
    Linear,
    Residual,
    TorchEngine,
    linear_split,
    shorter,
)
from verification.attacks import presets
from verification.attacks.attack import Attack, Crafted
from verification.attacks.autoattack import AutoAttack
from verification.attacks.gradient_attack import GradientAttack, Noise
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.presets import Variant, suite
from verification.attacks.query_attack import QueryAttack
from verification.attacks.rays import RayS
from verification.attacks.rounds import searches
from verification.attacks.skip_gradient import residual_ends
from verification.attacks.square import Square
from verification.attacks.suite import Source, run_suite
from verification.attacks.target import Target
from verification.attacks.transfer_presets import NEAREST
from verification.attacks.white_box_presets import CYCLES, SAMPLE
from verification.config import PRESETS, QUICK_LARGE, SUBSTITUTE, Preset


def gradients(attacks: Sequence[Attack]) -> list[GradientAttack]:
    return [attack for attack in attacks if isinstance(attack, GradientAttack)]


def test_on_large_images_the_dearest_are_left_out_and_weak_ones_run_in_the_largest_ball() -> None:
    def of(size: Preset) -> dict[str, Attack]:
        variant = Variant(
            preset="quick",
            classes=10,
            parts=frozenset(["b"]),
            brief=frozenset(["b"]),
            size=size,
            largest=0.1,
        )
        return {attack.name: attack for attack in suite(variant, ["a", "b"])}

    small, large = of(PRESETS["quick"]), of(QUICK_LARGE)
    left = [name for name in small if name not in large and "queries" not in name]
    assert {name.partition(" ")[0] for name in left} == {
        *("m-di2-nearest-ce", "m-di2-nearest-cw", "m-di2-fast-nearest-ce", "m-di2-fast-nearest-cw"),
        "vmi-nearest-ce",
    }
    kept = ["mpgd-fast-cw from a", "mpgd-fast-ce from b", "m-di2-nearest-ce from a"]
    assert {*kept, "bsr-nearest-cw from a"} <= large.keys()
    weak = [name for name, attack in large.items() if attack.only_eps]
    nearest = [name for name in large if "-nearest-" in name]
    annealed = [name for name in large if name.startswith("annealed")]
    assert weak == [*nearest, "pgd-cw on mean-logits", "pgd-ce on mean-softmax", *annealed]
    assert not [name for name, attack in small.items() if "pgd" in name and attack.only_eps]
    assert small["universal patterns"].control
    assert not large["universal patterns"].control


@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_presets_are_what_they_say(preset: str) -> None:
    chosen = suite(Variant(preset=preset, classes=10, reference=True), ["a", "b", "c"])
    names = [attack.name for attack in chosen]
    assert len(set(names)) == len(names)
    skipping = {"apgd", "annealed", "vmi", "reweighted", "autoattack"}
    for attack in chosen:
        skips = attack.name.split("-")[0].split()[0] in skipping or "-nearest-" in attack.name
        assert attack.skip_broken is skips
        assert attack.skip_broken or not any(
            each.skip_broken and each.threat == attack.threat
            for each in chosen[: chosen.index(attack)]
        )
    found = searches(chosen)
    order = [attack.loss for attack in found["apgd"]]
    assert order == ["ce", "cw", "dlr", "targeted"] * CYCLES
    assert [attack.control for attack in found["apgd"]] == [True] + [False] * (len(order) - 1)
    assert [attack.sample for attack in found["annealed"]] == [SAMPLE] + [0] * (CYCLES - 1)
    assert not any(attack.control for attack in found["annealed"])
    (base,) = [attack for attack in gradients(chosen) if attack.name == "pgd-cw on mean-logits"]
    if preset != "quick":  # the paper: 5 versions for each surrogate and loss, 30 in all
        protocol = [
            attack
            for attack in gradients(chosen)
            if attack.source in "abc" and not attack.skip_broken and "-fast-" not in attack.name
        ]
        assert sum(attack.restarts for attack in protocol) == 30
        assert {attack.steps for attack in protocol} == {100}
        assert {attack.rel_stepsize for attack in protocol} == {0.2}
        assert (base.steps, base.restarts) == (50, 5)
    budgets = [100, 1000] if preset == "quick" else [100, 1000, 5000]
    asking = [attack for attack in chosen if isinstance(attack, QueryAttack)]
    assert [attack.queries for attack in asking if isinstance(attack, Square)] == budgets
    by_labels = [attack for attack in asking if attack.answers == "labels"]
    kinds = [RayS] if preset == "quick" else [RayS, HopSkipJump]
    assert [type(attack) for attack in by_labels] == kinds
    assert {attack.queries for attack in by_labels} == {budgets[-1]}
    callers = [attack for attack in chosen if attack.threat == "queries"]
    assert {attack.sample for attack in callers} == {PRESETS[preset].sample}
    assert [attack.loss for attack in gradients(callers)] == ["ce", "cw"]
    assert {attack.source for attack in gradients(callers)} == {SUBSTITUTE}
    two = suite(Variant(preset=preset, classes=2), ["a"])
    assert not any(attack.loss == "dlr" for attack in gradients(two))
    assert [attack.loss for attack in searches(two)["apgd"]] == ["ce", "cw"] * CYCLES
    in_l2 = suite(Variant(preset=preset, classes=3, norm="l2"), ["a"])
    assert {attack.norm for attack in in_l2} == {"l2"}
    in_l2 = [attack for attack in in_l2 if isinstance(attack, QueryAttack)]
    assert [type(attack) for attack in in_l2] == [HopSkipJump]


def test_networks_alone_get_the_fast_attacks_and_ensembles_the_rest() -> None:
    alone = frozenset({"one", "two"})
    variant = Variant(preset="standard", classes=3, parts=alone | {"small"}, brief=alone)
    chosen = [
        attack
        for attack in gradients(suite(variant, ["small", "large", *alone]))
        if attack.threat == "transfer"
    ]
    kinds = {
        name: {
            attack.name.split("-ce ")[0].split("-cw ")[0]
            for attack in chosen
            if attack.source == name
        }
        for name in ("one", "small", "large")
    }
    assert kinds["one"] == {"mpgd-fast", "m-di2-nearest", "m-di2-fast-nearest", "vmi-nearest"}
    assert kinds["small"] == kinds["one"] | {"mpgd", "m-di2", "sgm"}
    assert kinds["large"] == kinds["small"] | {f"{kind}-nearest" for kind in ("bsr", "mef", "pgn")}
    fast = {(each.source, each.loss) for each in chosen if each.name.startswith("mpgd-fast")}
    both = {(name, loss) for name in ("one", "two", "small") for loss in ("ce", "cw")}
    assert fast == both | {("large", "cw")}


def test_a_suite_comes_back_from_its_json() -> None:
    chosen = suite(Variant(preset="full", classes=10, reference=True), ["a", "b"])
    tables = [attack.to_json() for attack in chosen]
    assert presets.from_json(tables) == chosen
    # Reports and the keys of the cache are made of this form: it must not change.
    assert all(list(table) == list(tables[0]) for table in tables)
    assert tables[0] == {
        "name": "noise",
        "threat": "transfer",
        "source": "none",
        "kind": "noise",
        "loss": "none",
        "output": "mean-logits",
        "norm": "linf",
        "steps": 0,
        "nearest_steps": 0,
        "targets": 0,
        "step_share": 0.2,
        "decay": None,
        "restarts": 1,
        "random_start": True,
        "diversity": 0.0,
        "skip_gamma": 1.0,
        "variance_samples": 0,
        "penalty_samples": 0,
        "flat_samples": 0,
        "shuffles": 0,
        "queries": 0,
        "answers": "none",
        "sample": 0,
        "standing_only": False,
        "nearest": 1.0,
        "control": True,
        "only_eps": None,
        "gate": "",
        "levels": (),
    }
    by_name = {table["name"]: table for table in tables}
    for cycle, nearest, steps in ((1, 1.0, (20, 100)), (CYCLES, 0.25, (100, 0))):
        one = by_name[f"apgd-targeted, cycle {cycle}"]
        assert (one["kind"], one["loss"], one["targets"]) == ("apgd", "targeted", 9)
        assert (one["steps"], one["nearest_steps"]) == steps
        assert (one["nearest"], one["gate"]) == (nearest, "converged")
    (vmi,) = [table for table in tables if table["name"] == "vmi-ce from b"]
    assert (vmi["decay"], vmi["variance_samples"], vmi["standing_only"]) == (1.0, 20, True)


def robust(attacks: Sequence[Attack]) -> dict[str, list[bool]]:
    """Run attacks on a model of which 125 is a weak image and 200 is not."""
    members = [Linear(classes=4), Linear(5.0, classes=4)]
    target = Target(TorchEngine([*members]), members)
    sources: dict[str, Source] = {
        "s": ([Residual(classes=4)], "s"),
        SUBSTITUTE: ([Linear(classes=4)], "stolen"),
    }
    split = linear_split([125, 200])
    outcome = run_suite(attacks, sources, {"m": target}, split, [EPS], seed=0)["m"]
    return {attack.name: outcome.robust([attack], EPS).tolist() for attack in attacks}


def test_every_kind_of_attack_of_the_full_preset_breaks_the_weak_image() -> None:
    assert residual_ends([Residual()])
    chosen = [
        replace(shorter(attack, 6, 300), restarts=1, skip_broken=False, nearest=1.0)
        for attack in suite(Variant(preset="full", classes=4), ["s"])
    ]
    ours = gradients(chosen)
    assert {attack.loss for attack in ours} == {"ce", "cw", "dlr", "reweighted"}
    assert {attack.output for attack in ours} == {"mean-logits", "mean-softmax", "logsumexp"}
    assert {attack.skip_gamma for attack in ours} == {0.2, 1.0}
    assert any(attack.diversity for attack in ours)
    for samples in ("variance_samples", "penalty_samples", "flat_samples", "shuffles"):
        assert any(getattr(attack, samples) for attack in ours)
    assert {Square, RayS, HopSkipJump} <= {type(attack) for attack in chosen}
    found = robust(chosen)
    for attack in chosen:
        if not isinstance(attack, Noise):
            assert found[attack.name] == [False, True], attack.name


def test_autoattack_breaks_the_weak_image() -> None:
    whole = suite(Variant(preset="full", classes=4, reference=True), ["s"])
    (attack,) = [attack for attack in whole if isinstance(attack, AutoAttack)]
    assert robust([replace(attack, skip_broken=False)])[attack.name] == [False, True]


def test_an_own_query_attack_comes_back_as_one() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ask(QueryAttack):
        def run(self, model: Any, images: Any, labels: Any, eps: float, *seed: int | str) -> Any:
            return Crafted(images)

    (again,) = presets.from_json([Ask(name="ask", queries=7, answers="labels").to_json()])
    assert isinstance(again, QueryAttack)
    assert (again.queries, again.answers) == (7, "labels")


def test_where_labels_alone_are_seen_no_image_counts_as_near() -> None:
    def shares(scores: bool) -> set[float]:
        chosen = suite(Variant(preset="quick", classes=10, scores=scores), ["s"])
        return {each.nearest for each in chosen if "-nearest" in each.name}

    assert shares(scores=True) == {NEAREST, NEAREST / 2}
    assert shares(scores=False) == {1.0}
