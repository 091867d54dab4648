"""The context of a verification: model, gradients, data, surrogates and attack suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dverge_serve.engine.card import Card
from dverge_serve.engine.report import report_path
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.files import check_writable
from dverge_serve.progress import Progress, say
from export.published_checkpoint import read_labels
from training.budget import within_budget
from training.config import DOWNLOADED, EMBEDDED, Config, Data
from training.config_parsing import assign
from training.data.splits import Split, TrainingData, load_rest, load_test, load_training
from training.device import pick_device
from training.recipe import data_overrides
from verification.attacks import autoattack, presets
from verification.attacks.attack import Attack
from verification.attacks.presets import Variant
from verification.attacks.skip_gradient import residual_ends
from verification.attacks.suite import check_suite
from verification.attacks.value_grid import coarse_levels, grid_attacks
from verification.auto_radii import control_and_sources, halving_radii
from verification.config import AUTO, SUBSTITUTE, Preset, VerificationConfig, preset_for
from verification.contract import Contract
from verification.foreign_model import ForeignEngine, gives_scores, open_engine
from verification.foreign_network import find_foreign_gradients
from verification.gates import NO_WEIGHTS
from verification.given_surrogates import given_surrogates
from verification.gradients import Gradients, find_gradients
from verification.oip_client import client
from verification.price import Price, forecast, price
from verification.service_client import Service
from verification.source_models import refuse_sources
from verification.substitute import MEMBERS
from verification.surrogate import Surrogate, clean_accuracies
from verification.surrogate_budget import within_pixels
from verification.surrogates import (
    SurrogateSet,
    surrogate_config,
    surrogate_sets,
    surrogates,
    with_known_start,
)

RECORDED = ("train_sha256", "source_models")  # what a card says of training beside its settings
CALIBRATION_IMAGES = 5000  # at most; they are kept as evidence


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything a verification works with, found and loaded."""

    config: VerificationConfig
    preset: Preset
    device: torch.device
    engine: Engine | ForeignEngine
    gradients: Gradients | None
    training: Config  # of the model, pointed at the data to use now; surrogates follow it
    data: TrainingData
    attacked: Data  # which images are test images
    split: Split
    holdout: Split  # calibrates the alarm; no training saw it
    training_known: bool  # whether `data` is what the model was trained on
    eps: tuple[float, ...]
    eps_given: tuple[str, ...]  # how their user wrote them, in the same order; or none
    surrogates: Sequence[Surrogate]
    surrogate_accuracy: Mapping[str, float]  # of each by its name, on the clean test images
    suite: Sequence[Attack]
    price: Price
    left_out: Sequence[dict[str, str]]  # what of the preset was not run, and why
    against: Engine | None
    service: Service | None


def find_context(config: VerificationConfig) -> Context:
    """Find gradients, data, surrogates and attack suite; train the surrogates that are missing.

    Whatever can be refused is refused before anything is trained.

    Raises:
        UserError: no such model, no data for it, data with other classes, a folder that cannot be
            written, a service that does not answer, two attacks of one name, an attack with a
            source that is not there.
    """
    device = pick_device(config.device)
    engine: Engine | ForeignEngine
    gradients, no_gradients = None, NO_WEIGHTS
    if config.labels is not None and config.data is not None:
        engine = open_engine(config.model, read_labels(config.labels), config.data, config.contract)
        if not config.eps and config.at_eps is None:  # nobody knows which radii are right for it
            config = replace(config, eps_given=(AUTO,))
    else:
        engine = Engine(config.model, device="cpu", spinning=False)
        gradients = find_gradients(
            engine.card, config.model, run=config.run, checkpoint=config.checkpoint, device=device
        )
        if gradients is None:
            say("no weights of this model were found (no `run` has them): no white-box attacks")
    check_writable(report_path(config.model))
    training = training_config(engine.card, gradients, config.data)
    written = dict(zip(config.eps, config.eps_given, strict=False))
    run = gradients.run if gradients else None
    training, no_start = with_known_start(training, run)
    eps = tuple(sorted(set(config.eps or training.verification.eps)))
    if config.at_eps is not None and config.at_eps not in eps:
        raise UserError(f"`at_eps` {config.at_eps:g}", f"one of {', '.join(f'{e:g}' for e in eps)}")
    against = _opponent(config.against, engine.card)
    data = load_training(training.data)
    training = within_budget(training, data)
    if isinstance(engine, ForeignEngine):
        if not config.surrogates and training.data.name == "imagefolder":
            training = within_pixels(training, len(data.train))
        engine = engine.settled(data, config.contract, search=config.search_contract)
        gradients, no_gradients = find_foreign_gradients(engine, device)
        if gradients is None:
            say(f"no white-box attacks: {no_gradients}")
    attacked = training.data
    preset = preset_for(config.preset, attacked.crop)
    if (limit := config.images or attacked.test_limit or preset.images(*attacked.crop)) > 0:
        attacked = replace(attacked, test_limit=limit)
    split = _test_split(attacked, engine.card).to(device)
    known = engine.card.training.get("train_sha256") == data.train.sha256
    holdout = data.holdout if known else load_rest(attacked)
    service = _service(config, engine, split)
    variant = Variant(
        preset=config.preset,
        norm=config.norm,
        classes=len(engine.card.labels),
        reference=autoattack.available(),
        scores=gives_scores(engine),
        size=preset,
        largest=None if config.auto_eps else max(eps),
    )
    made: list[Surrogate] = []
    sets: list[SurrogateSet] = []
    if config.surrogates:
        made = given_surrogates(
            config.surrogates, engine.card.labels, engine.card.input_shape, device
        )
        refuse_sources(made, engine.card)
    else:
        sets = surrogate_sets(training, preset.surrogates)
    sizes = {each.name: (len(each.indices), len(each.origin.architectures)) for each in made}
    for each in sets:
        sizes |= {name: (len(own), each.config.members) for name, own in each.parts.items()}
    names = list(sizes)
    parts = frozenset(name for name, (size, whole) in sizes.items() if size < whole)
    brief = {name for name in parts if sizes[name][0] == 1}
    brief |= {name for each in sets if each.mixed for name in each.parts}
    variant = replace(variant, parts=parts, brief=frozenset(brief))
    by_size = sorted(names, key=lambda name: sizes[name][0])
    more = [*grid_attacks(coarse_levels(split.images), by_size, config.norm), *config.attacks]
    suite = [*presets.suite(variant, names), *more]
    check_suite(suite, names)
    members = gradients.members if gradients else ()
    radii = 3 if config.auto_eps else len(eps)
    networks = {name: size for name, (size, _) in sizes.items()}
    networks |= dict.fromkeys(("target", "control"), len(members)) | {SUBSTITUTE: MEMBERS}
    cost = price(
        suite,
        networks,
        [each.config for each in sets]
        or list(dict.fromkeys(each.origin.config for each in made if each.origin.config)),
        None if isinstance(engine, ForeignEngine) else training,
        skipped=gradients.skipped if gradients else (),
        train_images=len(data.train),
        images=len(split),
        radii=radii,
    )
    if Progress.shown:
        say(f"{forecast(suite, made, sets, members, engine, data, split, radii, device)}; {cost}")
    made = made or surrogates(sets, data, device)
    variant = replace(variant, skips=all(residual_ends(each.members) for each in made))
    if config.auto_eps:
        control, sources = control_and_sources(run, made, training, device)
        eps = halving_radii(control, sources, split, config.norm, config.seed, preset.checked)
        variant = replace(variant, largest=max(eps))
    suite = [*presets.suite(variant, names), *more]
    if Progress.shown and len(eps) != radii:
        say(forecast(suite, made, [], members, engine, data, split, len(eps), device))
    return Context(
        config=config,
        preset=preset,
        device=device,
        engine=engine,
        gradients=gradients,
        training=training,
        data=data,
        attacked=attacked,
        split=split,
        holdout=holdout.take(slice(0, CALIBRATION_IMAGES)),
        training_known=known,
        eps=eps,
        eps_given=tuple(written[each] for each in eps) if written else (),
        surrogates=made,
        surrogate_accuracy=clean_accuracies(made, split),
        suite=suite,
        price=cost,
        left_out=_left_out(
            config,
            preset,
            variant,
            training,
            no_gradients if gradients is None else None,
            no_start,
        ),
        against=against,
        service=service,
    )


def _opponent(path: Path | None, card: Card) -> Engine | None:
    if path is None:
        return None
    engine = Engine(path, device="cpu", spinning=False)
    if engine.card.labels != card.labels or engine.card.input_shape != card.input_shape:
        raise UserError(
            f"{path} has other classes or another input", "a model of the same images and labels"
        )
    return engine


def _service(
    config: VerificationConfig, engine: Engine | ForeignEngine, split: Split
) -> Service | None:
    """Return the live service to attack, after a first answer from it."""
    if config.url is None:
        return None
    contract = engine.contract if isinstance(engine, ForeignEngine) else Contract()
    service = client(
        config.url, engine.card.labels, contract, config.requests, config.requests_a_second
    )
    with service:
        service.scores(split.images[:1].cpu().numpy())
    return service


def _left_out(
    config: VerificationConfig,
    preset: Preset,
    variant: Variant,
    training: Config,
    no_gradients: str | None,
    no_start: str,
) -> list[dict[str, str]]:
    """Return the parts of the preset that are not run, each with the reason."""
    missing = presets.left_out(variant)
    if not config.surrogates:
        kinds = preset.surrogates
        able = [kind for kind in kinds if surrogate_config(training, kind) is not None]
        missing |= {
            f"surrogate {kind}": f"none of its kind for {training.architecture}"
            for kind in kinds
            if kind not in able
        }
        if no_start:
            missing["surrogates from the model's starting weights"] = no_start
    if no_gradients is not None:
        missing["white-box attacks"] = no_gradients
    return [{"what": what, "why": why} for what, why in missing.items()]


def training_config(card: Card, gradients: Gradients | None, data: str | None) -> Config:
    """Return the settings a model was trained with, pointed at the data to use now.

    Raises:
        UserError: the data set is neither named nor one we can load by its name.
    """
    changes = {} if data is None else data_overrides(data)
    if gradients and gradients.run:
        config = gradients.run.config.overridden(changes)
    else:
        table = {key: value for key, value in card.training.items() if key not in RECORDED}
        table["data"] = dict(table["data"])
        for key, value in changes.items():  # first: a group is read in the light of the path
            assign(table, key, value, "`data`")
        config = Config.from_json(table, "the model's metadata")
    if config.data.name not in (*EMBEDDED, *DOWNLOADED) and not config.data.path:
        raise UserError(
            "no images to attack with", "the model's data", "give `data` FOLDER or `run` DIR"
        )
    return config


def _test_split(data: Data, card: Card) -> Split:
    labels, split = load_test(data)
    if labels != card.labels:
        raise UserError(
            f"the data has {len(labels)} classes ({', '.join(labels[:3])}, ...)",
            f"the model's {len(card.labels)} ({', '.join(card.labels[:3])}, ...)",
        )
    return split
