"""Verification from a model file to a report with a verdict."""

from __future__ import annotations

import os
import platform
import time

import torch

from dverge_serve.engine.report import Report, page_path, report_path
from dverge_serve.errors import UserError
from dverge_serve.files import pretty_json, write_atomic
from verification.assemble import assemble, nulls
from verification.attacked_models import find_targets
from verification.attacks import presets
from verification.attacks.cache import prune
from verification.attacks.suite import run_suite
from verification.config import VerificationConfig
from verification.context import find_context
from verification.live import attack_service
from verification.measures import measure
from verification.report.decision_regions import illustrate
from verification.report.evidence import Gathering, evidence_folder
from verification.report.page import page
from verification.run_gates import check
from verification.self_test import CHECKING


def attack_and_report(config: VerificationConfig) -> Report:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Raises:
        UserError: what `find_context` raises; a live service that stopped answering, after all
            else was written.
    """
    begun = time.time()
    context = find_context(config)
    targets, control = find_targets(context)
    sources = {each.name: (each.members, each.run.weights_sha256) for each in context.surrogates}
    evidence = Gathering(evidence_folder(config.model), context.split, context.holdout)
    outcomes = run_suite(
        context.suite,
        sources,
        targets,
        context.split,
        context.eps,
        seed=config.seed,
        evidence=evidence,
    )
    model, outcome = targets["model"], outcomes["model"]
    hidden, hidden_eps = presets.large(config.norm, context.split.images[0].numel())
    last = run_suite(
        [hidden],
        {},
        {"model": model},
        context.split,
        [hidden_eps],
        seed=config.seed,
        label=CHECKING,
    )["model"]
    checks = check(context, model, outcomes, control, (last, hidden, hidden_eps))
    measured = measure(context, model, outcome, evidence)
    table = assemble(context, outcomes, control, checks, measured)
    table["evidence"] = evidence.index
    unanswered = None
    if context.service is not None:
        served, eps = context.engine.sha256, max(context.eps)
        try:
            table["live"] = attack_service(
                context.service, context.split, outcome, served, eps, config.seed
            )
        except UserError as error:  # the rest is worth keeping
            unanswered, table["live"] = error, {"error": str(error)}
    table["run"] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - begun, 1),
        "device": str(context.device),
        "engine": context.engine.provider,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    report = Report.from_json(nulls(table))
    labels, split = context.engine.card.labels, context.split
    plots = illustrate(report, labels, context.engine, model.members, split, outcome)
    written, shown = pretty_json(report.to_json()), page(report, plots)
    evidence.finish(plots)
    write_atomic(report_path(config.model), written)
    write_atomic(page_path(config.model), shown)
    prune()
    if unanswered is not None:
        raise UserError(
            f"the live service: {unanswered.found}; {report_path(config.model)} has all the rest",
            unanswered.expected,
            unanswered.next_step,
        )
    return report
