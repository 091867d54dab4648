"""Verification from a model file to a report with a verdict."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from dverge_serve.engine.report_reader import page_path, report_path
from dverge_serve.errors import UserError
from dverge_serve.files import pretty_json, write_atomic
from verification.assemble import assemble, nulls
from verification.attacks import presets
from verification.attacks.cache import prune
from verification.attacks.suite import run_suite
from verification.config import Evaluation, find_setting
from verification.live import attack_service
from verification.measures import measure
from verification.report.decision_regions import illustrate
from verification.report.evidence import Gathering, evidence_folder
from verification.report.page import page
from verification.run_gates import check
from verification.self_test import CHECKING
from verification.targets import find_targets


def verify(asked: Evaluation) -> dict[str, Any]:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Raises:
        UserError: what `find_setting` raises; a live service that stopped answering, after all
            else was written.
    """
    begun = time.time()
    here = find_setting(asked)
    targets, control = find_targets(here)
    sources = {each.name: (each.members, each.run.weights_sha256) for each in here.surrogates}
    evidence = Gathering(evidence_folder(asked.model), here.split, here.holdout)
    outcomes = run_suite(
        here.suite, sources, targets, here.split, here.eps, seed=asked.seed, evidence=evidence
    )
    hidden, hidden_eps = presets.large(asked.norm, here.split.images[0].numel())
    last = run_suite(
        [hidden],
        {},
        {"model": targets["model"]},
        here.split,
        [hidden_eps],
        seed=asked.seed,
        label=CHECKING,
    )["model"]
    checks = check(here, targets["model"], outcomes, control, (last, hidden, hidden_eps))
    measured = measure(here, targets["model"], outcomes["model"], evidence)
    report = assemble(here, outcomes, control, checks, measured)
    report["evidence"] = evidence.index
    unanswered = None
    if here.service is not None:
        try:
            report["live"] = attack_service(
                here.service,
                here.split,
                outcomes["model"],
                here.engine.sha256,
                max(here.eps),
                asked.seed,
            )
        except UserError as error:  # what was found without it is worth keeping
            unanswered, report["live"] = error, {"error": str(error)}
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
    report = {key: nulls(value) for key, value in report.items()}
    model = targets["model"]
    drawn = illustrate(
        report, here.engine.card, here.engine, model.members, here.split, outcomes["model"]
    )
    written, shown = pretty_json(report), page(report, drawn)
    evidence.finish(drawn)
    write_atomic(report_path(asked.model), written)
    write_atomic(page_path(asked.model), shown)
    prune()
    if unanswered is not None:
        raise UserError(
            f"the live service: {unanswered.found}; {report_path(asked.model)} has all the rest",
            unanswered.expected,
            unanswered.next_step,
        )
    return report
