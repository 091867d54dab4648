"""What an evaluation is asked to do, and what it works with once everything is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dverge_serve.contract import Card
from dverge_serve.engine import Engine
from dverge_serve.errors import UserError
from training.attacks import Norm
from training.config import DOWNLOADED, EMBEDDED, Config
from training.data import Split, TrainingData, load_test, load_training
from training.recipe import data_overrides
from training.residual import residual_ends
from verification import presets, reference
from verification.attack import Attack
from verification.foreign import ForeignEngine
from verification.gradients import Gradients, find_gradients
from verification.surrogates import KINDS, Surrogate, given_surrogates, surrogates

CALIBRATION_IMAGES = 5000  # at most; they are kept as evidence


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation is asked to do."""

    model: Path
    preset: str = "quick"
    run: Path | None = None
    checkpoint: Path | None = None  # of the paper's published code, for gradients
    data: str | None = None  # a folder or a data set's name; by default the run's own
    labels: str | None = None  # of a foreign classifier: black-box only
    surrogates: Path | None = None  # a folder of runs; by default trained and cached
    url: str | None = None  # a live service of this model, attacked as well
    requests: int = 2000  # most of them to the live service
    requests_a_second: float = 50.0
    against: Path | None = None  # another model, attacked alike
    eps: tuple[float, ...] = ()  # by default the recipe's
    norm: Norm = "linf"
    images: int | None = None  # use only this many test images
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    at_eps: float | None = None  # a radius that must be among those evaluated


@dataclass(frozen=True)
class Setting:
    """What an evaluation works with, once everything is found."""

    asked: Evaluation
    engine: Engine | ForeignEngine
    gradients: Gradients | None
    config: Config
    data: TrainingData
    split: Split
    holdout: Split  # what the alarm is calibrated on
    eps: tuple[float, ...]
    surrogates: Sequence[Surrogate]
    suite: Sequence[Attack]


def find_setting(asked: Evaluation) -> Setting:
    """Find gradients, data, surrogates and the suite for what is asked; train what is missing.

    Raises:
        UserError: no such model, no data for it, or data with other classes.
    """
    engine: Engine | ForeignEngine
    gradients = None
    if asked.labels is not None:
        if asked.data is None:
            raise UserError("a foreign classifier without --data", "the images it is made for")
        engine = ForeignEngine(asked.model, asked.labels, asked.data)
    else:
        engine = Engine(asked.model, device="cpu")
        gradients = find_gradients(
            engine.card,
            asked.model,
            run=asked.run,
            checkpoint=asked.checkpoint,
            device=asked.device,
        )
    config = training_config(engine.card, gradients, asked.data)
    data = load_training(config.data)
    split = _test_split(config, engine.card, asked)
    holdout = data.holdout.take(slice(0, CALIBRATION_IMAGES))
    if asked.norm == "l2" and not asked.eps:
        raise UserError("--norm l2 without --eps", "L2 radii, e.g. --eps 0.25,0.5")
    eps = asked.eps or config.verification.eps
    if asked.at_eps is not None and asked.at_eps not in eps:
        raise UserError(f"--at-eps {asked.at_eps:g}", f"one of {', '.join(f'{e:g}' for e in eps)}")
    if asked.surrogates is not None:
        made = given_surrogates(asked.surrogates, engine.card.labels, asked.device)
    else:
        made = surrogates(config, data, asked.device, KINDS[asked.preset])
    suite = presets.suite(
        asked.preset,
        [surrogate.name for surrogate in made],
        eps,
        classes=len(engine.card.labels),
        skips=all(residual_ends(surrogate.members) for surrogate in made),
        norm=asked.norm,
        reference=reference.available(),
    )
    return Setting(asked, engine, gradients, config, data, split, holdout, eps, made, suite)


def training_config(card: Card, gradients: Gradients | None, data: str | None) -> Config:
    """Return the settings a model was trained with, pointed at the data to use now.

    Raises:
        UserError: the data set is neither named nor one we can load by its name.
    """
    if gradients is not None and gradients.run is not None:
        config = gradients.run.config
    else:
        table = {key: value for key, value in card.training.items() if key != "train_sha256"}
        config = Config.from_json(table, "the model's metadata")
    if data is not None:
        config = config.overridden(data_overrides(data))
    if config.data.name not in (*EMBEDDED, *DOWNLOADED) and not config.data.path:
        raise UserError(
            "no images to attack with", "the model's data", "give --data FOLDER or --run DIR"
        )
    return config


def _test_split(config: Config, card: Card, asked: Evaluation) -> Split:
    limit = asked.images if asked.images is not None else config.data.test_limit
    labels, split = load_test(replace(config.data, test_limit=limit))
    if labels != card.labels:
        raise UserError(
            f"the data has {len(labels)} classes ({', '.join(labels[:3])}, ...)",
            f"the model's {len(card.labels)} ({', '.join(card.labels[:3])}, ...)",
        )
    return split.to(asked.device)
