"""Replay: score the saved images again and compare every figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dverge_serve.engine.report import NORMS, Gate, Report
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from training.data.splits import Split
from verification.assemble import nulls
from verification.attacks import presets
from verification.attacks.outcomes import SOFT, Outcomes, Pixels
from verification.attacks.perturbation import count_norm_violations, decode_fp16
from verification.attacks.recorder import OutcomeRecorder
from verification.contract import Contract
from verification.foreign_file import open_foreign
from verification.foreign_model import ForeignEngine
from verification.gates import verdict
from verification.metrics import detection
from verification.metrics.by_queries import by_queries, under_substitute
from verification.metrics.robust_accuracy import THREATS, combinations, comparison, figures
from verification.report.evidence import evidence_folder, read_evidence

SAME = 1e-6  # relative: what rounding on another machine may do to a score


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    Args:
        images: adversarial images that were scored again.
        figures: numbers that were compared.
        differences: numbers that differ: the place, the report's value, the replay's.
    """

    images: int
    figures: int
    differences: list[tuple[str, Any, Any]]


def replay(path: Path) -> Replay:
    """Score the images saved with a report again and compare every figure computed from them.

    The model's figures are computed from the images, which must lie in their balls. The figures of
    the control, of another model and of the mean of softmax are computed from their outcome
    matrices, because of several restarts only the images that broke the model are saved; the
    verdict from the gates. The members' matrices need the weights and are not compared.

    Args:
        path: `model.report.json`, with the model file and `model.report/` beside it.

    Raises:
        UserError: a missing or changed file, or a report this version cannot read.
    """
    report = Report.load(path).to_json()
    model = path.with_name(report["model"]["file"])
    if not model.is_file():
        raise UserError(
            f"{model.name} is not in {path.parent}",
            "the model beside its report",
            f"move the report back, or copy {model.name} and {evidence_folder(model).name}/ to it",
        )
    engine: Engine | ForeignEngine
    if report["model"].get("foreign"):
        engine = _foreign(model, report)
    else:
        engine = Engine(model, device="cpu")
    if engine.sha256 != report["model"]["sha256"]:
        raise UserError(
            f"{model} has sha256 {engine.sha256[:12]}...",
            f"{report['model']['sha256'][:12]}..., which the report is about",
            "put that model back, or verify this one",
        )
    folder = evidence_folder(model)
    stored = read_evidence(folder, report["evidence"]["images"])
    split = Split(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))
    if split.sha256 != report["data"]["sha256"]:
        raise UserError(f"the images in {folder} are others than the report's", "its data slice")
    holdout = Split(torch.from_numpy(stored["holdout"]), torch.zeros(len(stored["holdout"])))

    suite = {attack.name: attack for attack in presets.from_json(report["attacks"])}
    eps: list[float] = report["threat_model"]["eps"]
    norm = {text: norm for norm, text in NORMS.items()}[report["threat_model"]["norm"]]
    recorder, extra, count = OutcomeRecorder(engine, split), {}, 0
    ran = Outcomes.from_json(report["outcomes"]["model"]).ran
    for entry in report["evidence"]["adversarial"]:
        arrays = read_evidence(folder, entry)
        steps = stored["images"].astype(np.int16) + arrays["delivered"]
        quantized = steps.clip(0, 255).astype(np.uint8)
        floats = decode_fp16(stored["images"], arrays["float"])
        wrapped = int((quantized != steps).any(axis=(1, 2, 3)).sum())
        violations = max(
            wrapped, count_norm_violations(floats, quantized, stored["images"], entry["eps"], norm)
        )
        if violations:
            raise UserError(
                f"{violations} images of '{entry['attack']}' lie outside the ball of "
                f"{entry['eps']:g}",
                "images inside it",
            )
        if entry["attack"] not in suite:
            extra[entry["attack"]] = (entry["eps"], quantized)
            continue
        attack, chosen = suite[entry["attack"]], ran[entry["attack"], entry["eps"]]
        recorder.record(attack, entry["eps"], floats[chosen], quantized, chosen)
        count += 2 * int(chosen.sum())

    outcome, attacks = recorder.outcomes, list(suite.values())
    outcome.queries |= Outcomes.from_json(report["outcomes"]["model"]).queries
    again: dict[str, Any] = figures(outcome, attacks, eps)
    again["by_queries"] = by_queries(outcome, attacks, eps)
    again["substitute"] = {"robust_accuracy": under_substitute(outcome, attacks, eps)}
    again["outcomes"] = {"model": outcome.to_json()}
    attacked = worst_at(outcome, max(eps)) | extra
    again["disagreement"] = detection.calibrate(engine, holdout, split) | {
        "alarm": detection.measure(engine, holdout, split, attacked)
    }
    again["combination"] = combinations(
        outcome, Outcomes.from_json(report["outcomes"][SOFT]), attacks, eps
    )
    for name in ("control", "against"):
        if report[name] is not None:
            other = Outcomes.from_json(report["outcomes"][name])
            again[name] = figures(other, attacks, eps)
            if name == "against":
                again[name]["comparison"] = comparison(outcome, other, attacks, eps)
    again["verdict"] = verdict([Gate(**gate) for gate in report["gates"]])
    differences: list[tuple[str, Any, Any]] = []
    compared = _compare(nulls(again), report, "", differences)
    return Replay(count, compared, differences)


def _foreign(model: Path, report: dict[str, Any]) -> ForeignEngine:
    """Open the foreign classifier of a report, whose weights may lie in other files."""
    told = report["model"]
    labels, data = told["labels"], report["data"]["name"]
    contract = Contract.from_json(told.get("contract", {"order": list(range(len(labels)))}))
    file = open_foreign(model, layout=contract.layout, labels_alone=contract.outputs == "labels")
    engine = ForeignEngine(file, labels, data, contract)
    if "contract" in told and engine.card.weights_sha256 != told["weights_sha256"]:
        raise UserError(
            f"the weights of {model} are others than the report's",
            "the files as they were attacked",
        )
    return engine


def worst_at(outcome: Outcomes, eps: float) -> dict[str, tuple[float, Pixels]]:
    """Return the worst 8-bit images of each threat with a figure of its own, at one radius."""
    return {
        threat: (at, pixels)
        for (at, threat), pixels in outcome.worst.items()
        if at == eps and threat in THREATS
    }


def _compare(again: Any, report: Any, place: str, differences: list[tuple[str, Any, Any]]) -> int:
    """Compare computed values with the report's, and return how many values were compared."""
    if isinstance(again, dict):
        return sum(
            _compare(value, (report or {}).get(key), f"{place}.{key}".lstrip("."), differences)
            for key, value in again.items()
            if key != "queries"  # spent while attacking; a replay only looks at the result
        )
    if isinstance(again, list) and isinstance(report, list) and len(again) == len(report):
        pairs = enumerate(zip(again, report, strict=True))
        return sum(_compare(a, b, f"{place}[{at}]", differences) for at, (a, b) in pairs)
    both = isinstance(again, float) and isinstance(report, int | float)
    same = math.isclose(again, report, rel_tol=SAME, abs_tol=SAME) if both else again == report
    if not same:
        differences.append((place, report, again))
    return 1
