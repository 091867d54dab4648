"""Verification from a model file to a report with a verdict."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from dverge_serve.files import pretty_json, write_atomic
from dverge_serve.report import page_path, report_path
from verification import presets
from verification.checks import check
from verification.evaluation import Evaluation, find_setting
from verification.evidence import Gathering, evidence_folder
from verification.illustrations import illustrate
from verification.live import Service, attack_service
from verification.measures import measure
from verification.page import page
from verification.report import assemble
from verification.suite import run_suite
from verification.targets import find_targets
from verification.vault import prune


def verify(asked: Evaluation) -> dict[str, Any]:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Raises:
        UserError: no such model, no data for it, or data with other classes.
    """
    begun = time.time()
    here = find_setting(asked)
    service = None
    if asked.url is not None:
        classes = len(here.engine.card.labels)
        service = Service(asked.url, classes, asked.requests, asked.requests_a_second)
    targets, control = find_targets(here)
    sources = {each.name: (each.members, each.run.weights_sha256) for each in here.surrogates}
    evidence = Gathering(evidence_folder(asked.model), here.split, here.holdout)
    outcomes = run_suite(
        here.suite, sources, targets, here.split, here.eps, seed=asked.seed, evidence=evidence
    )
    hidden, hidden_eps = presets.large(asked.norm, here.split.images[0].numel())
    last = run_suite(
        [hidden], {}, {"model": targets["model"]}, here.split, [hidden_eps], seed=asked.seed
    )["model"]
    checks = check(here, targets["model"], outcomes, control, (last, hidden, hidden_eps))
    measured = measure(here, targets["model"], outcomes["model"], evidence)
    report = assemble(here, outcomes, control, checks, measured)
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
