"""Budgets in gradients: epochs by the number of images, recorded, the same when a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.networks import tiny_config
from training.budget import gradient_evaluations, planned, within_budget
from training.config import Config
from training.data.splits import load_training, training_images
from training.recipe import load_recipe, recipe_for
from training.trainer import train


def bound(**changes: object) -> Config:
    """Return settings of which each stage has a budget; an image of DVERGE costs 4 gradients."""
    return tiny_config(
        standard__epochs=50,
        standard__budget=900,
        dverge__epochs=50,
        dverge__budget=1000,
        **changes,
    )


def test_the_images_there_are_decide() -> None:
    """90 images: 900 / 90 epochs, and 1000 / (90 * 4) rounded."""
    found = within_budget(bound())
    assert (found.standard.epochs, found.dverge.epochs) == (10, 3)
    assert (found.standard.budget, found.dverge.budget) == (0, 0)
    assert gradient_evaluations(found, 90) == {"standard": 900 * 2, "dverge": 3 * 90 * 4 * 2}
    assert planned(found, 90) == (
        "standard 10 epochs (1,800 gradients), dverge 3 epochs (2,160 gradients)"
    )
    assert within_budget(found) is found


@pytest.mark.parametrize(
    ("budget", "epochs"), [(1, 1), (90 * 4, 1), (90 * 4 * 49, 49), (10**9, 50)]
)
def test_at_least_one_epoch_and_at_most_the_recipes(budget: int, epochs: int) -> None:
    config = tiny_config(dverge__epochs=50, dverge__budget=budget)
    assert within_budget(config).dverge.epochs == epochs
    assert within_budget(config).standard == config.standard


def test_images_are_counted_as_they_are_loaded() -> None:
    data = bound().data
    assert training_images(data) == len(load_training(data).train) == 90


def test_a_run_records_its_epochs_and_goes_on_with_them(tmp_path: Path) -> None:
    config = bound()
    run = train(config, tmp_path / "run", device="cpu")
    assert (run.config.standard.epochs, run.config.dverge.epochs) == (10, 3)
    again = train(config, tmp_path / "run", device="cpu", resume=True)
    assert again.weights_sha256 == run.weights_sha256


def test_who_asks_for_epochs_gets_them() -> None:
    """A folder's recipe has budgets; epochs by name, or a named set's own recipe, have none."""
    assert load_recipe("images").dverge.budget > 0
    asked = load_recipe("images", {"dverge.epochs": 70})
    assert (asked.dverge.epochs, asked.dverge.budget) == (70, 0)
    assert asked.standard.budget > 0
    both = load_recipe("images", {"dverge.epochs": 70, "dverge.budget": 5})
    assert (both.dverge.epochs, both.dverge.budget) == (70, 5)
    named, own = recipe_for("svhn")
    assert load_recipe(named, own).dverge.budget == 0
