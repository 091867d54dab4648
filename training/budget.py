"""Budgets: epochs that suit the number of images, and the gradients that they will take."""

from __future__ import annotations

from collections.abc import Collection

from training.config import Config
from training.data.splits import TrainingData, training_images
from training.method_registry import METHODS, Method


def gradient_evaluations(
    config: Config, images: int, skipped: Collection[str] = ()
) -> dict[str, int]:
    """Return how many gradients of one member on one image each stage computes.

    What comes before a stage is not among them: source models and their attacks, last layers that
    are fitted to features.

    Args:
        config: of the run.
        images: in the training part.
        skipped: stages that starting weights stand for.
    """
    return {
        table: config.settings_of(table).epochs * method.gradients(config) * images * config.members
        for table, method in _stages(config).items()
        if table not in skipped
    }


def within_budget(config: Config, data: TrainingData | None = None) -> Config:
    """Return settings with the epochs that each stage's `budget` gives, in its place.

    They are `budget / (training images * gradients an image)`, rounded, but at least 1 and at most
    the recipe's. A run records them, so that it goes on as it began.

    Args:
        config: of a run.
        data: its images, where they are loaded already.

    Raises:
        UserError: missing or empty folders, a failed download.
    """
    bound = {
        table: method
        for table, method in _stages(config).items()
        if config.settings_of(table).budget
    }
    if not bound:
        return config
    images = training_images(config.data) if data is None else len(data.train)
    changes: dict[str, int] = {}
    for table, method in bound.items():
        settings = config.settings_of(table)
        affordable = round(settings.budget / (images * method.gradients(config)))
        changes[f"{table}.epochs"] = min(settings.epochs, max(1, affordable))
        changes[f"{table}.budget"] = 0
    return config.overridden(changes)


def planned(config: Config, images: int, skipped: Collection[str] = ()) -> str:
    """Return the epochs and gradients of a run's stages in words, see `gradient_evaluations`."""
    return ", ".join(
        f"{table} {config.settings_of(table).epochs} epochs ({count:,} gradients)"
        for table, count in gradient_evaluations(config, images, skipped).items()
    )


def _stages(config: Config) -> dict[str, Method]:
    """Return the methods of a run's stages by the names of their tables."""
    methods = (METHODS["standard"], METHODS[config.method])
    return {method.settings.table: method for method in methods}
