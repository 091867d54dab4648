"""Attacks and losses of a user's own, and attacks as plain callables and MAITE augmentations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dverge_serve.errors import UserError
from tests.verification.models import EPS, Linear, TorchEngine, linear_split, shorter
from training.data.splits import to_float
from training.models.ensemble import Ensemble
from verification.attacks import presets
from verification.attacks.attack import (
    NOTHING,
    Attack,
    Crafted,
    Model,
    ReportedAttack,
    Threat,
)
from verification.attacks.augmentation import AttackAugmentation
from verification.attacks.gradient_attack import GradientAttack, Noise
from verification.attacks.outcomes import Outcomes
from verification.attacks.presets import Variant, suite
from verification.attacks.square import Square
from verification.attacks.suite import run_suite
from verification.attacks.target import Target

VALUES = [120, 135, 200]  # margins of 7.5 and 72.5 steps; EPS has 12.75


@dataclass(frozen=True, kw_only=True)
class Shift(Attack):
    """Every pixel towards the other class, as far as `reach` times the radius."""

    name: str = "shift"
    threat: Threat = "white_box"
    source: str = "target"
    reach: float = 1.0

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        assert isinstance(model, Ensemble)
        away = torch.where(labels == 1, -eps, eps).view(-1, 1, 1, 1)
        return Crafted((images + self.reach * away).clamp(0, 1))


def right_minus_wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    """Raise the wrong class of two: a loss of one's own."""
    rows = torch.arange(len(labels))
    return outputs[rows, 1 - labels] - outputs[rows, labels]


def attacked(*attacks: Attack) -> Outcomes:
    members = [Linear(), Linear(5.0)]
    target = Target(TorchEngine([*members]), members, "weights of the model")
    split = linear_split(VALUES)
    return run_suite(attacks, {}, {"m": target}, split, [EPS], seed=0)["m"]


def test_an_attack_of_ones_own_runs_in_a_suite() -> None:
    outcome = attacked(Shift())
    assert outcome.robust([Shift()], EPS).tolist() == [False, False, True]
    assert outcome.violations == 0


def test_an_attack_of_ones_own_that_leaves_the_ball_is_counted() -> None:
    assert attacked(Shift(reach=2.0)).violations == len(VALUES)


def test_a_loss_of_ones_own_is_raised() -> None:
    attack = GradientAttack(
        name="own", threat="white_box", source="target", loss=right_minus_wrong, steps=10
    )
    assert attacked(attack).robust([attack], EPS).tolist() == [False, False, True]
    upside_down = GradientAttack(
        name="harmless",
        threat="white_box",
        source="target",
        loss=lambda outputs, labels: -right_minus_wrong(outputs, labels),
        steps=10,
    )
    assert attacked(upside_down).robust([upside_down], EPS).all()


def test_only_what_its_json_identifies_is_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    named: dict[str, Any] = {"threat": "white_box", "source": "target", "steps": 2}

    class Variant(GradientAttack):
        """A relative of ours with other code, but the same parameters."""

    for attack in (
        Shift(),
        GradientAttack(name="own loss", loss=right_minus_wrong, **named),
        Variant(name="ours", **named),
    ):
        attacked(attack)
    assert not list(tmp_path.rglob("*.npz"))
    attacked(GradientAttack(name="ours", **named))
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_a_report_describes_attacks_and_losses_of_ones_own() -> None:
    own = GradientAttack(
        name="own loss", threat="white_box", source="target", loss=right_minus_wrong, norm="l2"
    )
    assert Shift().to_json()["kind"] == "own"
    assert own.to_json()["loss"] == "right_minus_wrong"
    shift, loss = presets.from_json([Shift(gate="g").to_json(), own.to_json()])
    assert isinstance(shift, ReportedAttack)
    assert (shift.name, shift.threat, shift.gate) == ("shift", "white_box", "g")
    assert shift.to_json() == Shift(gate="g").to_json()
    assert isinstance(loss, ReportedAttack)
    assert (loss.name, loss.threat, loss.norm) == ("own loss", "white_box", "l2")
    with pytest.raises(NotImplementedError, match="does not hold the code of 'shift'"):
        attacked(shift)


@dataclass(frozen=True, kw_only=True)
class Careless(Shift):
    """Leaves the model in training mode, as it may do, and then fails."""

    fails: bool = False

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        assert isinstance(model, Ensemble)
        assert not model.training  # a wrapped library that puts the mode back puts back this one
        model.train()
        if self.fails:
            raise RuntimeError("a mistake")
        return super().run(model, images, labels, eps, *seed)


@pytest.mark.parametrize("source", ["target", "s"])
def test_no_attack_leaves_the_members_in_training_mode(source: str) -> None:
    members = [Linear().eval(), Linear(5.0).eval()]
    target = Target(TorchEngine([*members]), members, "weights of the model")
    for fails in (False, True):
        with pytest.raises(RuntimeError, match="a mistake") if fails else nullcontext():
            run_suite(
                [Careless(source=source, fails=fails)],
                {"s": (members, "weights of the surrogate")},
                {"m": target},
                linear_split(VALUES),
                [EPS],
                seed=0,
            )
        assert not any(member.training for member in members)
    assert not NOTHING.training


@dataclass(frozen=True, kw_only=True)
class Asks(Attack):
    """Knows the answers alone, and remembers what it was given."""

    name: str = "asks"
    threat: Threat = "queries"
    source: str = "target"
    given: list[Model] = field(default_factory=list)

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        self.given.append(model)
        assert not model(images.clone().requires_grad_()).requires_grad
        return Crafted(images)


def test_who_may_only_ask_gets_no_weights() -> None:
    asks = Asks()
    assert attacked(asks).robust([asks], EPS).all()
    assert not isinstance(asks.given[0], torch.nn.Module)
    with pytest.raises(TypeError, match=r"follows a torch\.nn\.Module, not function"):
        attacked(GradientAttack(name="pgd", threat="queries", source="target"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "kl"}, "the attack 'a' has loss 'kl'; expected ce, cw, dlr or reweighted"),
        ({"output": "max"}, "output 'max'; expected mean-logits, mean-softmax or logsumexp"),
        ({"norm": "l1"}, "norm 'l1'; expected linf or l2"),
        ({"threat": "white-box"}, "threat 'white-box'; expected transfer, queries or white_box"),
        ({"source": "none"}, "'a' has no source"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"name": "a", "threat": "white_box", "source": "target"}
    with pytest.raises(UserError, match=words):
        GradientAttack(**(right | settings))


def test_a_suite_refuses_two_of_a_name_and_unknown_sources() -> None:
    with pytest.raises(UserError, match="2 attacks are named 'shift'"):
        attacked(Shift(), Shift(reach=0.5))
    with pytest.raises(UserError, match="has the source 'nobody'"):
        attacked(Shift(source="nobody"))


FULL = [
    shorter(attack, 10, 2000)
    for attack in suite(Variant(preset="full", classes=2, skips=False), ["s"])
    if not attack.gate or attack.name.endswith("cycle 1")  # the others differ in the name alone
]


@pytest.mark.parametrize("attack", FULL, ids=lambda attack: attack.name)
@pytest.mark.parametrize("model", [Linear(), Ensemble([Linear(), Linear(5.0)])])
def test_every_attack_is_a_plain_callable(attack: Attack, model: torch.nn.Module) -> None:
    split = linear_split(VALUES)
    images = to_float(split.images)
    found = attack(model, images, split.labels, EPS)
    assert float((found - images).abs().max()) <= EPS + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(found, attack(model, images, split.labels, EPS))
    wrong = model(found).argmax(1) != split.labels
    assert wrong.tolist() == ([False] * 3 if isinstance(attack, Noise) else [True, True, False])


def test_of_several_restarts_the_first_that_breaks_is_kept() -> None:
    sizes: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Once(Shift):
        """Breaks images at its second restart alone."""

        restarts: int = 3

        def run(
            self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
        ) -> Crafted:
            sizes.append(len(images))
            return super().run(model, images, labels, eps if seed[-1] == 1 else 0.0)

    split = linear_split(VALUES)
    images = to_float(split.images)
    found = Once()(Ensemble([Linear()]), images, split.labels, EPS)
    changed = (found != images).flatten(1).any(1)
    assert changed.tolist() == [True, True, False]
    assert sizes == [3, 3, 1]


def test_a_gradient_attack_refuses_a_model_without_gradients() -> None:
    attack = GradientAttack(name="pgd", threat="white_box", source="target")
    split = linear_split(VALUES)
    with pytest.raises(TypeError, match=r"follows a torch\.nn\.Module, not function"):
        attack(lambda x: x, to_float(split.images), split.labels, EPS)


@pytest.mark.parametrize(
    "attack",
    [
        Noise(name="noise", threat="transfer", source="none"),
        GradientAttack(name="pgd", threat="white_box", source="target", loss="cw"),
        Square(name="square", queries=60),
    ],
)
def test_an_attack_is_a_maite_augmentation(attack: Attack) -> None:
    split, model = linear_split(VALUES), Linear()
    images = list(to_float(split.images).numpy())
    targets = list(np.eye(2, dtype=np.float32)[split.labels.numpy()])
    metadata: list[dict[str, Any]] = [{"id": each} for each in range(len(split))]
    augmentation = AttackAugmentation(attack, model, EPS)
    made, same, marked = augmentation((images, targets, metadata))
    assert augmentation.metadata["id"] == f"{attack.name}, linf eps 0.05, seed 0"
    expected = attack(model, to_float(split.images), split.labels, EPS)
    np.testing.assert_array_equal(np.stack(made), expected.numpy())
    assert all(each.dtype == np.float32 and each.shape == (1, 8, 8) for each in made)
    assert all(given is back for given, back in zip(targets, same, strict=True))
    assert [each["id"] for each in marked] == [0, 1, 2]
    assert {each["attack"] for each in marked} == {augmentation.metadata["id"]}
    assert metadata == [{"id": 0}, {"id": 1}, {"id": 2}]  # the caller's own is left alone
