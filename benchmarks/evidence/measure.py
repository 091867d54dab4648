"""The measurement of one cell: train, export, attack, count."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench import machine
from benchmarks.evidence import record
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.protocol import evidence_cache, trained_surrogates
from benchmarks.evidence.record import Record
from benchmarks.evidence.rules import under_attack
from dverge_serve import __version__
from dverge_serve.engine.session import Engine
from dverge_serve.files import canonical_json
from export.exporter import export
from training.budget import gradient_evaluations
from training.config import Config
from training.data.splits import Split, load_test
from training.device import autocast_dtype
from training.runs.directory import Run
from training.trainer import train
from verification import verify
from verification.attacks import presets
from verification.attacks.outcomes import Outcomes
from verification.given_surrogates import given_surrogates
from verification.gradients import find_gradients
from verification.metrics.detection import DEPLOYED

ALARM = ("auroc", "tpr_at_0.05", "fpr_at_0.05")


def measure(cell: Cell, device: torch.device) -> Record:
    """Run one cell. What is in the cache already is not made again.

    Raises:
        UserError: hardware that the cell needs is not here.
    """
    begun, before = time.monotonic(), machine()
    config, protocol = cell.settings, cell.protocol
    autocast_dtype(config.precision, device)  # refuses hardware it lacks before anything is made
    name = f"{cell.slug}-{record.fingerprint(cell.definition())[:12]}"
    folder = evidence_cache() / "cells" / name
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    run = train(config, folder / "run", device=device, resume=True)
    export(run, model, form="grouped")
    surrogates = trained_surrogates(protocol, device)
    attacking = time.monotonic()
    report = verify(
        model,
        preset=protocol.preset,
        run=run,
        surrogates=surrogates,
        eps=protocol.eps,
        images=protocol.images or None,
        seed=protocol.seed,
        device=device,
    ).to_json()
    suite = presets.from_json(report["attacks"])
    split = _test(config, protocol.images, device)
    assert split.sha256 == report["data"]["sha256"]
    engine = Engine(model, device="cpu")
    gradients = find_gradients(engine.card, model, run=run.path, checkpoint=None, device=device)
    assert gradients is not None
    found = given_surrogates([surrogates], engine.card.labels, engine.card.input_shape, device)
    sources = {each.name: (each.members, each.weights) for each in found}
    rules = under_attack(engine, gradients, suite, sources, split, protocol.eps, protocol.seed)
    outcome = Outcomes.from_json(report["outcomes"]["model"])
    return {
        "schema_version": record.SCHEMA_VERSION,
        "recipe": protocol.recipe,
        "name": cell.name,
        "method": cell.method,
        "members": cell.members,
        "seed": cell.seed,
        "definition_sha256": record.fingerprint(cell.definition()),
        "n": len(split),
        "eps": list(protocol.eps),
        "figures": _figures(report),
        "control": _figures(report["control"]) if report["control"] else None,
        "outcomes": record.threats(outcome, suite, protocol.eps),
        "rules": {rule: record.threats(each, suite, protocol.eps) for rule, each in rules.items()},
        "alarm": _alarm(report),
        "diversity": _diversity(report),
        "training": _training(run, config),
        "verdict": report["verdict"],
        "gates_not_passed": [gate["name"] for gate in report["gates"] if not gate["passed"]],
        "surrogates": {
            each["name"]: each["holdout_accuracy"]
            for each in report["surrogates"]
            if each["holdout_accuracy"] is not None  # of a whole run
        },
        "weights_sha256": report["model"]["weights_sha256"],
        "seconds": {
            "attacking": round(time.monotonic() - attacking, 1),
            "all": round(time.monotonic() - begun, 1),
        },
        "machine": before | {"torch": torch.__version__, "device": str(device)},
        "version": {"dverge": __version__, "commit": _commit()},
        "definition": json.loads(canonical_json(cell.definition())),
    }


def _test(config: Config, limit: int, device: torch.device) -> Split:
    _, split = load_test(replace(config.data, test_limit=limit))
    return split.to(device)


def _figures(table: dict[str, Any]) -> Record:
    return {
        "clean": table["clean_accuracy"]["value"],
        **{
            threat: {f"{row['eps']:g}": row[threat]["value"] for row in table["robust_accuracy"]}
            for threat in ("transfer", "white_box")
        },
    }


def _alarm(report: dict[str, Any]) -> list[Record]:
    """Return how well the deployed score detects each kind of attack."""
    return [
        {"attack": row["attack"], "eps": row["eps"], **{key: row[key] for key in ALARM}}
        for row in report["disagreement"]["alarm"]
        if row["score"] == DEPLOYED
    ]


def _diversity(report: dict[str, Any]) -> float | None:
    """Return the paper's metric in nats, the mean over pairs of members."""
    if not report["members"] or not report["members"].get("diversity"):
        return None
    pairs = [v for row in report["members"]["diversity"]["nats"] for v in row if v is not None]
    return float(np.mean(pairs)) if pairs else None


def _training(run: Run, config: Config) -> Record:
    """Return what training cost, stage by stage; seconds add up over interruptions."""
    seconds: dict[str, float] = {}
    count = run.checkpoint["train_images"]
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        spent = count / epoch["images_per_s"]
        seconds[epoch["stage"]] = seconds.get(epoch["stage"], 0.0) + spent
    return {
        "images": count,
        "gradient_evaluations": gradient_evaluations(config, count),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "holdout_accuracy": run.checkpoint["holdout_accuracy"],
        "precision": run.checkpoint["provenance"]["precision"],
        "threads": run.checkpoint["provenance"]["threads"],
        "parameters": run.checkpoint["parameters"],
    }


def _commit() -> str:
    """Return the checkout's commit, with + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
