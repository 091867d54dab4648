"""What a verification costs: the count is what attacks and training really do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dverge_serve.engine.outputs import Scores
from tests.conftest import TINY
from tests.verification.models import Linear, TorchEngine, linear_split
from training.data.splits import load_test, load_training
from training.recipe import load_recipe
from verification.attacks.gradient_attack import GradientAttack, Noise
from verification.attacks.presets import Variant, suite
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.config import PRESETS, QUICK_LARGE, preset_for
from verification.price import answer_count, forecast, gradient_cost, price
from verification.surrogate_budget import FEWEST, MOST, PIXELS, within_pixels
from verification.surrogates import surrogate_sets


class Counted(Linear):
    """Counts the images that it takes gradients of."""

    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x) * torch.is_grad_enabled()
        return super().forward(x)


def test_counted_gradients_are_those_that_are_computed() -> None:
    members, other, own = [Counted(), Counted()], [Counted()], [Counted(), Counted()]
    attack = GradientAttack(name="a", threat="transfer", source="s", steps=3)
    chosen: list[Any] = [
        attack,
        replace(attack, name="b", penalty_samples=2, restarts=2),
        replace(attack, name="w", threat="white_box", source="target"),
        replace(attack, name="m", threat="white_box", source="target", control=False),
        replace(attack, name="one", only_eps=0.1),
        Square(name="square", threat="queries", source="target", queries=5, control=False),
    ]
    targets = {
        "model": Target(TorchEngine([*own]), own, "model"),
        "control": Target(TorchEngine([*other]), other, "control"),
    }
    split = linear_split([10, 120, 140])
    outcomes = run_suite(chosen, {"s": (members, "")}, targets, split, [0.05, 0.1], seed=0)
    sizes = {"s": 2, "target": 2, "control": 1}
    seen = sum(each.seen for each in (*members, *other, *own))
    assert gradient_cost(chosen, sizes, images=3, radii=2) == seen
    assert outcomes["model"].gradients + outcomes["control"].gradients == seen


class Answering(TorchEngine):
    """Counts the images that it answers."""

    answered, sha256 = 0, "a file"

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        self.answered += len(images)
        return super().run_all(images)


def test_counted_answers_are_those_that_are_asked_for(cache: Path) -> None:
    square = Square(name="s", threat="queries", source="target", queries=5, control=False, sample=3)
    chosen: list[Any] = [
        Noise(name="noise", threat="transfer", source="none"),
        GradientAttack(name="a", threat="white_box", source="target", steps=3, only_eps=1e-3),
        square,
        RayS(name="rays", queries=7, control=False),
    ]
    members = [Linear()]
    engines = {name: Answering([*members]) for name in ("model", "control")}
    targets = {name: Target(each, members, name) for name, each in engines.items()}
    split = linear_split([10, 20, 30, 40])  # nothing breaks: all queries are spent
    run_suite(chosen, {}, targets, split, [1e-3, 2e-3], seed=0)
    asked = sum(each.answered for each in engines.values()) - 2 * len(split)  # the clean images
    assert answer_count(chosen, images=4, radii=2) == asked


def test_broken_images_cost_nothing_more() -> None:
    own = [Counted()]
    attack = GradientAttack(name="a", threat="white_box", source="target", steps=3)
    chosen = [attack, replace(attack, name="b", skip_broken=True)]
    target = {"model": Target(TorchEngine([*own]), own, "model")}
    outcomes = run_suite(chosen, {}, target, linear_split([10, 120, 140]), [0.1], seed=0)
    assert outcomes["model"].gradients == own[0].seen == 3 * 3 + 3 * 1


def test_gradients_from_the_cache_are_counted_as_if_they_were_made(cache: Path) -> None:
    own = [Counted()]
    attack = GradientAttack(name="a", threat="white_box", source="target", steps=3)
    target = {"model": Target(TorchEngine([*own]), own, "its weights")}
    found = [
        run_suite([attack], {}, target, linear_split([10, 120]), [0.1], seed=0)["model"].gradients
        for _ in range(2)
    ]
    assert found == [6, 6]
    assert own[0].seen == 6


@pytest.mark.parametrize(
    # The recipe `images` distils with one step and one partner: its training is the cheaper one.
    ("preset", "share"),
    [("digits", 0.55), ("images", 1.2)],
)
def test_what_quick_costs_beside_the_training_of_the_model(preset: str, share: float) -> None:
    config = load_recipe(preset)
    sets = surrogate_sets(config, PRESETS["quick"].surrogates)
    (only,) = sets
    names = {name: len(indices) for name, indices in only.parts.items()}
    parts = frozenset(name for name, size in names.items() if size < only.config.members)
    variant = Variant(preset="quick", classes=10, parts=parts)
    transfer = [each for each in suite(variant, list(names)) if each.threat == "transfer"]
    images = min(360, PRESETS["quick"].images(*config.data.crop))
    whole = price(transfer, names, [only.config], config, train_images=1293, images=images, radii=3)
    assert whole.surrogates == 5 * config.standard.epochs * 1293
    assert whole.attacks == round(gradient_cost(transfer, names, images, 3))
    assert whole.whole < share * (whole.training or 0)  # the rest is for the other attacks
    assert str(whole).startswith(f"about {whole.whole / (whole.training or 1):.2g}")
    assert whole.to_json()["model_training"] == whole.training


def test_quick_attacks_as_many_images_as_fit_its_pixels() -> None:
    def images(preset: str, size: int) -> int:
        return preset_for(preset, (size, size)).images(size, size)

    assert [images("quick", size) for size in (8, 32, 48, 64, 65, 224)] == [
        *(3906, 244, 120, 120),
        *(60, 60),
    ]
    assert images("standard", 32) == images("standard", 224) == 0  # all of them


def test_quick_takes_less_of_large_images_and_nothing_else_does() -> None:
    large, small = (preset_for("quick", (size, size)) for size in (128, 32))
    assert (large, small) == (QUICK_LARGE, PRESETS["quick"])
    assert (large.budgets[0], large.sample) < (small.budgets[1], small.sample)
    assert large.substitute < small.substitute
    for name in ("standard", "full"):
        assert preset_for(name, (224, 224)) is PRESETS[name]


def test_surrogates_of_unknown_training_see_as_many_pixels_whatever_their_number() -> None:
    config = load_recipe("images", {"data.crop": [48, 48]})
    found = within_pixels(config, 5000)
    assert found.standard.epochs == PIXELS // (5000 * 48 * 48)
    assert (found.architecture, found.data.flip) == ("resnet14", False)
    assert within_pixels(config, 300).standard.epochs == MOST
    assert within_pixels(config, 10**6).standard.epochs == FEWEST


def test_the_forecast_names_what_will_take_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    config = load_recipe("digits", TINY | {"seed": 1234})
    data, (_, split), cpu = load_training(config.data), load_test(config.data), torch.device("cpu")
    sets = surrogate_sets(config, ["mixed-3", "mixed-5"])
    names = [name for each in sets for name in each.parts]
    chosen = suite(Variant(preset="quick", classes=10), names)
    engine = TorchEngine([Linear(classes=10)])
    told = forecast(chosen, [], sets, [], engine, data, split, 2, cpu)
    assert told.startswith("surrogates: 5 networks to train for ")
    assert f"attacks: {len(chosen)} at 2 radii on {len(split)} images, about " in told
    assert told.endswith("gates and other measurements: about 0s")  # without gradients
    folder = sets[0].folder(data)
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").touch()
    again = forecast(chosen, [], sets, [], engine, data, split, 2, cpu)
    assert again.startswith("surrogates: none to train; ")
    (folder / "checkpoint.json").unlink()
