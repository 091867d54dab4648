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
from dverge_serve.report import SCHEMA_VERSION, report_path
from export.export import export
from export.parity import Parity, compare, torch_scores
from training.config import DOWNLOADED, EMBEDDED, Config, data_overrides
from training.data import Split, load_test, load_training, to_float
from training.members import folded
from training.run import Run
from verification import gates
from verification.statistics import Mask, rate
from verification.suite import VERSIONS, Attack, Outcomes, Target, quick_suite, run_suite
from verification.surrogates import Surrogate, surrogates

OUT_OF_SCOPE = (
    "attacks larger than the stated eps, other norms, patches, rotations and physical attacks",
    "poisoned training data, model theft, privacy of the training images",
    "attackers who query the service many times (no query-based attack in this preset)",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation is asked to do."""

    model: Path
    run: Path | None = None
    data: str | None = None  # a folder or a data set's name; by default the run's own
    eps: tuple[float, ...] = ()  # by default the recipe's
    images: int | None = None  # use only this many test images
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    at_eps: float | None = None  # a radius that must be among those evaluated


def verify(asked: Evaluation) -> dict[str, Any]:
    """Attack a model file, write `model.report.json` beside it and return the report.

    Raises:
        UserError: no such model, no data for it, or data with other classes.
    """
    begun = time.time()
    engine = Engine(asked.model, device="cpu")
    run = find_run(engine.card, asked.run)
    config = training_config(engine.card, run, asked.data)
    data = load_training(config.data)
    split = _test_split(config, engine.card, asked)
    eps = asked.eps or config.verification.eps
    if asked.at_eps is not None and asked.at_eps not in eps:
        raise UserError(f"--at-eps {asked.at_eps:g}", f"one of {', '.join(f'{e:g}' for e in eps)}")
    made = surrogates(config, data, asked.device)
    suite = quick_suite([surrogate.name for surrogate in made])

    with tempfile.TemporaryDirectory(prefix="dverge-") as folder:
        targets = {"model": Target(engine, _members(run, "members", asked.device))}
        if run is not None:
            export(run, Path(folder) / "control.onnx", which="standard")
            control = Engine(Path(folder) / "control.onnx", device="cpu")
            targets["control"] = Target(control, _members(run, "standard", asked.device))
    sources = {surrogate.name: surrogate.members for surrogate in made}
    outcomes = run_suite(suite, sources, targets, split, eps, seed=asked.seed)

    checks = [
        gates.finite(list(outcomes.values())),
        gates.eps_8bit(list(outcomes.values())),
        gates.parity(_parity(targets["model"], outcomes["model"], split)),
        gates.control_falls(outcomes.get("control"), suite, eps),
        gates.weaker_never_beats(outcomes["model"], suite, eps),
    ]
    report = {
        "schema_version": SCHEMA_VERSION,
        "verdict": gates.verdict(checks),
        "preset": "quick",
        "model": {
            "file": asked.model.name,
            "sha256": engine.sha256,
            "name": engine.card.name,
            "members": engine.card.members,
            "precision": engine.card.precision,
            "weights_sha256": engine.card.weights_sha256,
        },
        "threat_model": {
            "goal": "untargeted: any wrong answer",
            "norm": "Linf",
            "eps": list(eps),
            "transfer": "knows the training data, architecture and schedule, not the weights",
            "white_box": "knows the weights",
            "delivered": "adversarial images rounded to 8 bits inside the eps ball",
            "float": "unrounded, the figure to set beside published ones",
            "robust": "right when clean and after every attack, float and delivered",
        },
        "data": {"name": config.data.name, "part": "test", "n": len(split), "sha256": split.sha256},
        **_figures(outcomes["model"], suite, eps),
        "control": _figures(outcomes["control"], suite, eps) if "control" in outcomes else None,
        "gates": [check.to_json() for check in checks],
        "disagreement": calibrate(engine, data.holdout),
        "attacks": [attack.to_json() for attack in suite],
        "surrogates": [_surrogate_json(surrogate) for surrogate in made],
        "seed": asked.seed,
        "outcomes": {name: _outcomes_json(outcome) for name, outcome in outcomes.items()},
        "out_of_scope": list(OUT_OF_SCOPE),
        "tool_version": __version__,
    }
    report["configuration_sha256"] = sha256(
        canonical_json([report["attacks"], list(eps), asked.seed, report["surrogates"]])
    )
    report["run"] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - begun, 1),
        "device": str(asked.device),
        "engine": engine.provider,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_atomic(report_path(asked.model), pretty_json(report))
    return report


def find_run(card: Card, path: Path | None) -> Run | None:
    """Return the run that made a model: the one given, or one under `runs/` with these weights.

    Raises:
        UserError: the run given has other weights.
    """
    if path is not None:
        run = Run.open_finished(path)
        if run.weights_sha256 != card.weights_sha256:
            raise UserError(
                f"{path} has weights {run.weights_sha256[:12]}, the model was made from "
                f"{card.weights_sha256[:12]}",
                "the run this model was exported from",
            )
        return run
    for checkpoint in sorted(Path("runs").glob("*/checkpoint.json")):
        run = Run(checkpoint.parent)
        if run.weights_sha256 == card.weights_sha256:
            return Run.open_finished(checkpoint.parent)
    return None


def training_config(card: Card, run: Run | None, data: str | None) -> Config:
    """Return the settings a model was trained with, pointed at the data to use now.

    Raises:
        UserError: the data set is neither named nor one we can load by its name.
    """
    if run is not None:
        config = run.config
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


def calibrate(engine: Engine, holdout: Split) -> dict[str, Any]:
    """Choose the disagreement over which the service calls an image suspicious.

    Returns:
        the threshold that at most 5% of held-out clean images exceed (1% from 1,000 images on).
    """
    share = 0.05 if len(holdout) < 1000 else 0.01
    found = engine.run_all(to_float(holdout.images).cpu().numpy()).disagreement
    return {
        "score": "jensen-shannon",
        "threshold": float(np.quantile(found, 1 - share, method="higher")),
        "false_positive_rate": share,
        "calibration_images": len(holdout),
    }


def _test_split(config: Config, card: Card, asked: Evaluation) -> Split:
    limit = asked.images if asked.images is not None else config.data.test_limit
    labels, split = load_test(replace(config.data, test_limit=limit))
    if labels != card.labels:
        raise UserError(
            f"the data has {len(labels)} classes ({', '.join(labels[:3])}, ...)",
            f"the model's {len(card.labels)} ({', '.join(card.labels[:3])}, ...)",
        )
    return split.to(asked.device)


def _members(run: Run | None, which: str, device: torch.device) -> Sequence[torch.nn.Module] | None:
    return [folded(member).to(device) for member in run.members(which)] if run else None


def _parity(target: Target, outcome: Outcomes, split: Split) -> list[Parity] | None:
    """Compare torch with the engine on clean images and on the hardest adversarial ones."""
    if target.members is None:
        return None
    return [
        compare(torch_scores(target.members, images), target.engine.run_all(images.cpu().numpy()))
        for images in [to_float(split.images), *outcome.hardest.values()]
    ]


def _figures(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> dict[str, Any]:
    def of(threat: str | None, each: float) -> dict[str, Any] | None:
        chosen = [attack for attack in suite if threat in (None, attack.threat)]
        ran = [attack for attack in chosen if (attack.name, each, "float") in outcome.survived]
        if not ran:
            return None
        robust: Mask = outcome.robust(ran, each, VERSIONS)
        return {
            **rate(robust),
            "of_clean_correct": rate(robust[outcome.clean])["value"],
            **{version: float(outcome.robust(ran, each, [version]).mean()) for version in VERSIONS},
            "attacks": {
                attack.name: float(outcome.robust([attack], each, VERSIONS).mean())
                for attack in ran
            },
        }

    return {
        "clean_accuracy": rate(outcome.clean & ~outcome.invalid),
        "robust_accuracy": [
            {
                "eps": each,
                "transfer": of("transfer", each),
                "white_box": of("white_box", each),
                "all": of(None, each),
            }
            for each in eps
        ],
    }


def _outcomes_json(outcome: Outcomes) -> dict[str, Any]:
    """Return the per-image matrix: one character an image, 1 right, 0 wrong, in test order."""

    def line(mask: Mask) -> str:
        return "".join("1" if each else "0" for each in mask)

    return {
        "clean": line(outcome.clean),
        "invalid": line(outcome.invalid),
        "survived": [
            {"attack": attack, "eps": eps, "version": version, "images": line(mask)}
            for (attack, eps, version), mask in outcome.survived.items()
        ],
    }


def _surrogate_json(surrogate: Surrogate) -> dict[str, Any]:
    config = surrogate.run.config
    return {
        "name": surrogate.name,
        "method": config.method,
        "architecture": config.architecture,
        "members": config.members,
        "seed": config.seed,
        "weights_sha256": surrogate.run.weights_sha256,
        "holdout_accuracy": surrogate.run.checkpoint["holdout_accuracy"],
    }
