"""Verification from a model file to a report with a verdict."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dverge_serve import __version__
from dverge_serve.contract import Card
from dverge_serve.engine import Engine
from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json, pretty_json, sha256, write_atomic
from dverge_serve.report import SCHEMA_VERSION, page_path, report_path
from dverge_serve.scores import Scores
from export.export import export
from export.parity import compare, torch_scores
from training.attacks import Norm, residual_ends
from training.config import DOWNLOADED, EMBEDDED, Config, data_overrides
from training.data import Split, TrainingData, load_test, load_training
from training.diversity import diversity
from training.members import Member
from verification import alarm, gates, matrices, presets, reference
from verification.attack import Attack
from verification.evidence import Gathering, evidence_folder
from verification.figures import clean_scores, combinations, comparison, figures, to_float_numpy
from verification.foreign import ForeignEngine
from verification.gates import Gate
from verification.gradients import Gradients, find_gradients, find_run, flow, ready
from verification.illustrations import illustrate
from verification.live import Service, attack_service
from verification.outcomes import Outcomes, Target
from verification.page import page
from verification.planted import planted
from verification.replay import worst_at
from verification.suite import run_suite
from verification.surrogates import KINDS, Surrogate, given_surrogates, surrogates
from verification.vault import keep, prune

AWARE_STEPS = {"quick": 20, "standard": 50, "full": 100}
CALIBRATION_IMAGES = 5000  # at most; they are kept as evidence
OUT_OF_SCOPE = (
    "attacks larger than the stated eps, other norms, patches, rotations and physical attacks",
    "poisoned training data, model theft, privacy of the training images",
    "attackers who adapt to more than the weights and the alarm of this model",
)
NO_QUERIES = "attackers who query the service many times (no query-based attack in this preset)"


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


def verify(asked: Evaluation) -> dict[str, Any]:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Raises:
        UserError: no such model, no data for it, or data with other classes.
    """
    begun = time.time()
    here = _setting(asked)
    service = None
    if asked.url is not None:
        classes = len(here.engine.card.labels)
        service = Service(asked.url, classes, asked.requests, asked.requests_a_second)
    targets, control = _targets(here)
    sources = {each.name: (each.members, each.run.weights_sha256) for each in here.surrogates}
    evidence = Gathering(evidence_folder(asked.model), here.split, here.holdout)
    outcomes = run_suite(
        here.suite, sources, targets, here.split, here.eps, seed=asked.seed, evidence=evidence
    )
    hidden, hidden_eps = presets.large(asked.norm, here.split.images[0].numel())
    last = run_suite(
        [hidden], {}, {"model": targets["model"]}, here.split, [hidden_eps], seed=asked.seed
    )["model"]
    checks = _gates(here, targets["model"], outcomes, control, (last, hidden, hidden_eps))
    measured = _measures(here, targets["model"], outcomes["model"], evidence)
    report = _report(here, outcomes, control, checks, measured)
    report["evidence"] = evidence.index
    if service is not None:
        report["live"] = attack_service(
            service,
            here.split,
            outcomes["model"],
            here.engine.sha256,
            max(here.eps),
            asked.seed,
        )
    report["run"] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - begun, 1),
        "device": str(asked.device),
        "engine": here.engine.provider,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    model = targets["model"]
    drawn = illustrate(
        report, here.engine.card, here.engine, model.members, here.split, outcomes["model"]
    )
    evidence.finish(drawn)
    write_atomic(report_path(asked.model), pretty_json(report))
    write_atomic(page_path(asked.model), page(report, drawn))
    prune()
    return report


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


def _setting(asked: Evaluation) -> Setting:
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


def _test_split(config: Config, card: Card, asked: Evaluation) -> Split:
    limit = asked.images if asked.images is not None else config.data.test_limit
    labels, split = load_test(replace(config.data, test_limit=limit))
    if labels != card.labels:
        raise UserError(
            f"the data has {len(labels)} classes ({', '.join(labels[:3])}, ...)",
            f"the model's {len(card.labels)} ({', '.join(card.labels[:3])}, ...)",
        )
    return split.to(asked.device)


def _targets(here: Setting) -> tuple[dict[str, Target], str]:
    """Return what is attacked, the model first, and what the control is.

    The control is the run's own standard members; without a run, the first surrogate, attacked
    from the others.
    """
    found, device = here.gradients, here.asked.device
    targets = {
        "model": Target(
            here.engine,
            found.members if found else None,
            found.weights if found else here.engine.card.weights_sha256,
        )
    }
    control, what = (found.run, "standard") if found and found.run else (None, "members")
    if control is None and len(here.surrogates) > 1:
        control = here.surrogates[0].run
    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        if control is not None:
            path = Path(folder) / "control.onnx"
            export(control, path, which="standard" if what == "standard" else "members")
            members = [ready(member, device) for member in control.members(what)]
            weights = str(control.checkpoint[f"{what}_sha256"])
            targets["control"] = Target(Engine(path, device="cpu"), members, weights)
    if here.asked.against is not None:
        targets["against"] = _against(here)
    if control is None:
        return targets, "none"
    return targets, "own" if what == "standard" else here.surrogates[0].name


def _against(here: Setting) -> Target:
    assert here.asked.against is not None
    engine = Engine(here.asked.against, device="cpu")
    if engine.card.labels != here.engine.card.labels or (
        engine.card.input_shape != here.engine.card.input_shape
    ):
        raise UserError(
            f"{here.asked.against} has other classes or another input",
            "a model of the same images and labels",
        )
    run = find_run(engine.card, None)
    members = [ready(member, here.asked.device) for member in run.members()] if run else None
    return Target(engine, members, engine.card.weights_sha256)


def _gates(
    here: Setting,
    model: Target,
    outcomes: dict[str, Outcomes],
    control: str,
    last: tuple[Outcomes, Attack, float],
) -> list[Gate]:
    mine, everyone = outcomes["model"], list(outcomes.values())
    clean = clean_scores(here.engine, here.split)
    backwards = clean_scores(here.engine, here.split.take(torch.arange(len(here.split)).flip(0)))
    again = Scores(backwards.logits[::-1], backwards.member_logits[::-1])
    zero, broken = None, None
    if model.members is not None:
        zero, broken, _ = flow(model.members, here.split, here.suite)
    named = "control" if control == "own" else f"control ({control})"
    return [
        gates.finite(everyone),
        gates.deterministic(clean, again),
        gates.not_probabilities(clean),
        gates.nonzero_gradient(zero, broken),
        gates.eps_8bit(everyone),
        _parity(here, model, mine),
        gates.grows_with_eps(mine, here.suite, here.eps),
        gates.reaches_chance(*last, classes=len(here.engine.card.labels)),
        gates.iterative_beats_single(mine, here.suite, here.eps),
        gates.converged(mine, here.suite),
        gates.weaker_never_beats(mine, here.suite, here.eps),
        gates.control_falls(outcomes.get("control"), here.suite, here.eps, named),
        gates.planted_found(*planted(here.split, here.asked.seed)),
    ]


def _parity(here: Setting, model: Target, outcome: Outcomes) -> Gate:
    """Compare torch with the engine on clean images and on the worst adversarial ones."""
    if model.members is None:
        return gates.parity(None)
    pairs = []
    for pixels in [here.split.images.cpu().numpy(), *outcome.worst.values()]:
        floats = to_float_numpy(pixels)
        x = torch.from_numpy(floats).to(here.split.images.device)
        pairs.append((torch_scores(model.members, x), here.engine.run_all(floats)))
    if (precision := here.engine.card.precision) != "fp32":
        same = [(torch_.predictions == found.predictions).mean() for torch_, found in pairs]
        return gates.variant_parity(float(np.mean(same)), precision)
    return gates.parity([compare(*pair) for pair in pairs])


def _measures(
    here: Setting, model: Target, outcome: Outcomes, evidence: Gathering
) -> dict[str, Any]:
    """Measure what is not accuracy: the alarm, the members' matrices, the combinations."""
    attacked = worst_at(outcome, max(here.eps))
    found: dict[str, Any] = {"members": None}
    if model.members is not None:
        members, eps = model.members, max(here.eps)
        steps = AWARE_STEPS[here.asked.preset]

        def aware() -> dict[str, Any]:
            return {
                "pixels": alarm.aware(members, here.split, eps, steps=steps, seed=here.asked.seed)
            }

        key = ["aware", eps, steps, here.asked.seed, here.split.sha256, model.weights]
        if here.asked.norm == "linf":
            pixels = keep(key, aware)["pixels"]
            attacked["detector-aware"] = (eps, pixels)
            nothing = np.zeros(pixels.shape, np.float16)
            evidence.add("detector-aware", eps, nothing, pixels)
        if all(isinstance(member, Member) for member in members):
            found["members"] = _matrices(here, members)
    found["disagreement"] = alarm.calibrate(here.engine, here.holdout) | {
        "alarm": alarm.measure(here.engine, here.holdout, here.split, attacked)
    }
    found["combination"] = combinations(here.engine, here.split, outcome.worst)
    return found


def _matrices(here: Setting, members: Sequence[Any]) -> dict[str, Any]:
    middle = sorted(here.eps)[len(here.eps) // 2]
    _, _, norms = flow(members, here.split, here.suite)
    found = {"gradient_norms": norms}
    if here.asked.norm == "linf":
        found["transferability"] = matrices.transferability(
            members, here.split, middle, here.asked.seed
        )
    found["diversity"] = diversity(members, here.split, here.config.dverge, here.asked.seed)
    return found


def _report(
    here: Setting,
    outcomes: dict[str, Outcomes],
    control: str,
    checks: Sequence[Gate],
    measured: dict[str, Any],
) -> dict[str, Any]:
    asked, card, gradients = here.asked, here.engine.card, here.gradients
    queries = any(attack.queries for attack in here.suite)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": gates.verdict(checks),
        "preset": asked.preset,
        "model": {
            "file": asked.model.name,
            "sha256": here.engine.sha256,
            "name": card.name,
            "members": card.members,
            "precision": card.precision,
            "weights_sha256": card.weights_sha256,
            "labels": list(card.labels),
            "gradients": gradients.origin if gradients else "none",
        },
        "threat_model": {
            "goal": "untargeted: any wrong answer",
            "norm": "Linf" if asked.norm == "linf" else "L2",
            "eps": list(here.eps),
            "transfer": "knows the training data, architecture and schedule, not the weights",
            "white_box": "knows the weights",
            "delivered": "adversarial images rounded to 8 bits inside the eps ball",
            "float": "unrounded (changes kept in float16), to set beside published figures",
            "robust": "right when clean and after every attack, float and delivered",
        },
        "data": {
            "name": here.config.data.name,
            "part": "test",
            "n": len(here.split),
            "sha256": here.split.sha256,
            "train_sha256": here.data.train.sha256,
        },
        **figures(outcomes["model"], here.suite, here.eps),
        "control": None,
        "against": None,
        "gates": [check.to_json() for check in checks],
        **measured,
        "attacks": [attack.to_json() for attack in here.suite],
        "surrogates": [surrogate.to_json() for surrogate in here.surrogates],
        "seed": asked.seed,
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()},
        "out_of_scope": [*OUT_OF_SCOPE, *([] if queries else [NO_QUERIES])],
        "tool_version": __version__,
    }
    if "control" in outcomes:
        report["control"] = {"what": control} | figures(outcomes["control"], here.suite, here.eps)
    if "against" in outcomes and asked.against is not None:
        rows = comparison(outcomes["model"], outcomes["against"], here.suite, here.eps)
        report["against"] = {
            "file": asked.against.name,
            "sha256": sha256(asked.against.read_bytes()),
            **figures(outcomes["against"], here.suite, here.eps),
            "comparison": rows,
        }
    report["configuration_sha256"] = sha256(
        canonical_json([report["attacks"], list(here.eps), asked.seed, report["surrogates"]])
    )
    return report
