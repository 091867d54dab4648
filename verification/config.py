"""What an evaluation is asked to do, and what it works with once everything is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dverge_serve.engine.card import Card
from dverge_serve.engine.report_reader import report_path
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.files import check_writable
from dverge_serve.progress import say
from export.published_checkpoint import read_labels
from training.attacks import Norm
from training.config import DOWNLOADED, EMBEDDED, Config
from training.data.splits import Split, TrainingData, load_rest, load_test, load_training
from training.recipe import data_overrides
from verification.attacks import autoattack as reference
from verification.attacks import presets
from verification.attacks.attack import Attack
from verification.attacks.presets import Variant
from verification.attacks.skip_gradient import residual_ends
from verification.foreign_model import ForeignEngine
from verification.gradients import Gradients, find_gradients
from verification.live import Service
from verification.surrogates import KINDS, Surrogate, given_surrogates, surrogate_config, surrogates

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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an evaluation works with, once everything is found."""

    asked: Evaluation
    engine: Engine | ForeignEngine
    gradients: Gradients | None
    config: Config
    data: TrainingData
    split: Split
    holdout: Split  # what the alarm is calibrated on; no training saw it
    training_known: bool  # whether `data` is what the model was trained on
    eps: tuple[float, ...]
    surrogates: Sequence[Surrogate]
    suite: Sequence[Attack]
    left_out: Sequence[dict[str, str]]  # what of the preset was not run, and why
    against: Engine | None
    service: Service | None


def find_setting(asked: Evaluation) -> Setting:
    """Find gradients, data, surrogates and the suite for what is asked; train what is missing.

    Whatever can be refused is refused before anything is trained.

    Raises:
        UserError: no such model, no data for it, data with other classes, a folder that cannot be
            written, a service that does not answer.
    """
    engine: Engine | ForeignEngine
    gradients = None
    if asked.labels is not None:
        if asked.data is None:
            raise UserError("a foreign classifier without --data", "the images it is made for")
        engine = ForeignEngine(asked.model, read_labels(asked.labels, None), asked.data)
    else:
        engine = Engine(asked.model, device="cpu")
        gradients = find_gradients(
            engine.card,
            asked.model,
            run=asked.run,
            checkpoint=asked.checkpoint,
            device=asked.device,
        )
        if gradients is None:
            say("no weights of this model were found: no white-box attacks. Give --run DIR")
    check_writable(report_path(asked.model))
    config = training_config(engine.card, gradients, asked.data)
    if asked.norm == "l2" and not asked.eps:
        raise UserError("--norm l2 without --eps", "L2 radii, e.g. --eps 0.25,0.5")
    eps = tuple(sorted(set(asked.eps or config.verification.eps)))
    if asked.at_eps is not None and asked.at_eps not in eps:
        raise UserError(f"--at-eps {asked.at_eps:g}", f"one of {', '.join(f'{e:g}' for e in eps)}")
    against = _opponent(asked.against, engine.card)
    data = load_training(config.data)
    split = _test_split(config, engine.card, asked)
    known = engine.card.training.get("train_sha256") == data.train.sha256
    holdout = data.holdout if known else _unattacked(config, asked)
    service = _service(asked, engine.card, split)
    if asked.surrogates is not None:
        made = given_surrogates(asked.surrogates, engine.card, asked.device)
    else:
        made = surrogates(config, data, asked.device, KINDS[asked.preset])
    variant = Variant(
        preset=asked.preset,
        norm=asked.norm,
        classes=len(engine.card.labels),
        skips=all(residual_ends(surrogate.members) for surrogate in made),
        reference=reference.available(),
    )
    return Setting(
        asked=asked,
        engine=engine,
        gradients=gradients,
        config=config,
        data=data,
        split=split,
        holdout=holdout.take(slice(0, CALIBRATION_IMAGES)),
        training_known=known,
        eps=eps,
        surrogates=made,
        suite=presets.suite(variant, [surrogate.name for surrogate in made], eps),
        left_out=_left_out(asked, variant, config, gradients),
        against=against,
        service=service,
    )


def _opponent(path: Path | None, card: Card) -> Engine | None:
    if path is None:
        return None
    engine = Engine(path, device="cpu")
    if engine.card.labels != card.labels or engine.card.input_shape != card.input_shape:
        raise UserError(
            f"{path} has other classes or another input",
            "a model of the same images and labels",
        )
    return engine


def _service(asked: Evaluation, card: Card, split: Split) -> Service | None:
    """Return the live service that was asked for, after a first answer from it."""
    if asked.url is None:
        return None
    service = Service(asked.url, len(card.labels), asked.requests, asked.requests_a_second)
    service.scores(split.images[:1].cpu().numpy())
    return service


def _unattacked(config: Config, asked: Evaluation) -> Split:
    """Return test images that are not attacked: held out from a training that is not known."""
    limit = asked.images if asked.images is not None else config.data.test_limit
    return load_rest(replace(config.data, test_limit=limit))


def _left_out(
    asked: Evaluation, variant: Variant, config: Config, gradients: Gradients | None
) -> list[dict[str, str]]:
    """Return what of the preset was not run, and why."""
    missing = presets.left_out(variant)
    if asked.surrogates is None:
        missing |= {
            f"surrogate {kind}": f"none of its kind for {config.architecture}"
            for kind in KINDS[asked.preset]
            if surrogate_config(config, kind) is None
        }
    if gradients is None:
        missing["white-box attacks"] = "no weights to take gradients from"
    return [{"what": what, "why": why} for what, why in missing.items()]


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
