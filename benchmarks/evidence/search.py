"""Look for settings on held-out images: `python -m benchmarks.evidence.search NAME [--json FILE]`.

NAME is `fast`, for a cheaper recipe of DVERGE, `transfer`, for one that learns from the attacks of
other networks, or `partners`, for the rate of many members.

Seeds from 100 on, never those of the cells; the test images are not touched. What looks good here
becomes a cell, and is confirmed or refuted there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench import machine, say
from benchmarks.evidence.cells import EXACT
from benchmarks.evidence.protocol import (
    DIGITS,
    Protocol,
    evidence_cache,
    trained_surrogates,
    training_data,
)
from dverge_serve.files import canonical_json, pretty_json, sha256, write_atomic
from dverge_serve.progress import show
from training.budget import gradient_evaluations
from training.data.splits import TrainingData
from training.recipe import load_recipe
from training.trainer import train
from verification.attacks.presets import Variant, suite
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.given_surrogates import given_surrogates
from verification.gradients import ready
from verification.self_test import TorchScorer

SEEDS = (100, 101)
# A third of the images held out, where the recipe holds out a tenth: differences are small.
SEARCH = replace(DIGITS, overrides=(("data.holdout", 0.3),))
ONE_CYCLE = {"standard.schedule": "one-cycle", "dverge.schedule": "one-cycle"}
ONE_STEP = {"dverge.steps": 1, "dverge.step_size": 0.2} | ONE_CYCLE
TWO_STEPS = {"dverge.steps": 2, "dverge.step_size": 0.12} | ONE_CYCLE
# At most a quarter of the exact recipe's gradient evaluations.
QUARTER = {"standard.epochs": 15, "dverge.epochs": 28}  # with two steps
LONGER = {"standard.epochs": 15, "dverge.epochs": 37}  # with one
SHORT = {"standard.epochs": 12, "dverge.epochs": 15}
AVERAGED = {"dverge.average": 0.25}
SMALL = {"batch_size": 32}
EVERY = {"dverge.layer_every": "batch"}
FAST: dict[str, dict[str, Any]] = {
    "exact": EXACT,
    "recipe": {},
    "two steps": TWO_STEPS | QUARTER,
    "two steps, averaged": TWO_STEPS | QUARTER | AVERAGED,
    "two steps, batches of 32": TWO_STEPS | QUARTER | SMALL,
    "two steps, batches of 32, averaged": TWO_STEPS | QUARTER | SMALL | AVERAGED,
    "two steps, batches of 32, a layer every batch": TWO_STEPS | QUARTER | SMALL | EVERY,
    "two steps, lr in steps, averaged": TWO_STEPS
    | QUARTER
    | AVERAGED
    | {"standard.schedule": "step", "dverge.schedule": "step"},
    "one step, 37 epochs, averaged": ONE_STEP | LONGER | AVERAGED,
    "one step, 37 epochs, batches of 32": ONE_STEP | LONGER | SMALL,
    "one step, 37 epochs, batches of 32, a layer every batch": ONE_STEP | LONGER | SMALL | EVERY,
    "one step, 12 + 15 epochs, batches of 32": ONE_STEP | SHORT | SMALL,
}
# What the recipe took over from here is spelled out, so that it stays what was measured.
STORED = {
    "method": "transfer",
    "transfer.networks": 5,
    "transfer.eps": 0.2,
    "transfer.schedule": "one-cycle",
}
TEN, WIDER = {"transfer.networks": 10}, {"transfer.eps": 0.25}
TRANSFER: dict[str, dict[str, Any]] = {
    "3 networks, lr in steps": STORED | {"transfer.networks": 3, "transfer.schedule": "step"},
    "3 networks": STORED | {"transfer.networks": 3},
    "5 networks": STORED,
    "5 networks, eps .25": STORED | WIDER,
    "10 networks": STORED | TEN,
    "10 networks, eps .25": STORED | TEN | WIDER,
    "5 networks and DVERGE's loss": STORED
    | {"method": "dverge+transfer", "dverge.schedule": "one-cycle"},
}
# The sum of equation 3 grows with the members, and with it each step: how far must the rate fall?
PARTNERS: dict[str, dict[str, Any]] = {
    f"{members} members, one partner, lr {lr:g}": ONE_STEP
    | LONGER
    | SMALL
    | {"members": members, "dverge.partners": 1, "dverge.lr": lr}
    for members in (8, 16)
    for lr in (0.1, 0.05, 0.025)
}
SEARCHES = {"fast": FAST, "transfer": TRANSFER, "partners": PARTNERS}


def measure(
    protocol: Protocol,
    name: str,
    overrides: Mapping[str, Any],
    seed: int,
    data: TrainingData,
    surrogates: Path,
) -> dict[str, Any]:
    """Train one candidate and attack the held-out images from the surrogates."""
    config = load_recipe(
        protocol.recipe, dict(protocol.overrides) | dict(overrides) | {"seed": seed}
    )
    device = torch.device("cpu")
    key = sha256(canonical_json(config.to_json()))[:16]
    run = train(config, evidence_cache() / "search" / key, device=device, resume=True, data=data)
    members = [ready(member, device) for member in run.members()]
    shape = config.data.preprocess.shape
    found = [
        each for each in given_surrogates([surrogates], data.labels, shape, device) if each.whole
    ]
    variant = Variant(preset="quick", classes=len(data.labels))
    attacks = suite(variant, [each.name for each in found])
    attacks = [each for each in attacks if each.source not in ("target", "none")]
    outcome = run_suite(
        attacks,
        {each.name: (each.members, each.weights) for each in found},
        {"candidate": Target(TorchScorer(members), None)},
        data.holdout,
        protocol.eps,
        seed=protocol.seed,
    )["candidate"]
    return {
        "candidate": name,
        "seed": seed,
        "gradients": sum(gradient_evaluations(config, len(data.train)).values()),
        "clean": float(outcome.clean.mean()),
        **{f"{eps:g}": float(outcome.robust(attacks, eps).mean()) for eps in protocol.eps},
    }


def main() -> None:
    """Run the search and print a table, the candidates' means over the seeds."""
    show()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("search", choices=SEARCHES, help="what is looked for")
    parser.add_argument("--json", type=Path, help="write the rows here; those there stay")
    parser.add_argument("--only", default="", help="candidates with this in their name")
    options = parser.parse_args()
    data, surrogates = training_data(SEARCH), trained_surrogates(SEARCH, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    if options.json and options.json.is_file():
        rows = json.loads(options.json.read_text())["rows"]
    known = {(row["candidate"], row["seed"]) for row in rows}
    for seed in SEEDS:
        for name, overrides in SEARCHES[options.search].items():
            if options.only in name and (name, seed) not in known:
                rows.append(measure(SEARCH, name, overrides, seed, data, surrogates))
                say(str(rows[-1]))
                if options.json:
                    found = {"machine": machine(), "holdout": len(data.holdout), "rows": rows}
                    write_atomic(options.json, pretty_json(found))
    columns = ["gradients", "clean", *(f"{eps:g}" for eps in SEARCH.eps)]
    print("| candidate |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["candidate"] for row in rows):
        means = [np.mean([r[c] for r in rows if r["candidate"] == name]) for c in columns]
        print(f"| {name} | {means[0]:,.0f} |", " | ".join(f"{m:.3f}" for m in means[1:]), "|")


if __name__ == "__main__":
    main()
