"""Verification from a model file to a report with a verdict."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace

import torch

from dverge_serve.engine.provenance import add_report
from dverge_serve.engine.report import Report, page_path, report_path
from dverge_serve.errors import UserError
from dverge_serve.files import pretty_json, write_atomic
from dverge_serve.progress import say
from training.data.splits import image_files
from training.runs.lock import held
from verification.assemble import assemble, nulls
from verification.attacked_models import find_targets
from verification.attacks.cache import prune
from verification.attacks.gradient_count import counted
from verification.attacks.query_attack import Answers
from verification.attacks.suite import run_suite
from verification.config import SUBSTITUTE, VerificationConfig
from verification.context import Context, find_context
from verification.foreign_model import gives_scores
from verification.leakage import known_leakage
from verification.live import Caller, attack_service
from verification.metrics.by_queries import under_substitute
from verification.metrics.more_clean_images import more_clean_images
from verification.report.decision_regions import illustrate
from verification.report.evidence import EvidenceWriter, evidence_folder
from verification.report.examples import examples
from verification.report.page import page
from verification.run_gates import check
from verification.run_metrics import measure
from verification.substitute import Substitute, ask_engine, steal


def attack_and_report(config: VerificationConfig) -> Report:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Raises:
        UserError: what `find_context` raises; another process that verifies this model; a live
            service that stopped answering, after all else was written.
    """
    if not config.model.is_file():
        return _attack_and_report(config)  # refuses it
    lock = report_path(config.model).with_suffix(".lock")
    with held(lock, f"is verifying {config.model}", "wait until it is done"):
        return _attack_and_report(config)


def _attack_and_report(config: VerificationConfig) -> Report:
    begun = time.time()
    context = find_context(config)
    targets, control = find_targets(context)
    sources = {each.name: (each.members, each.weights) for each in context.surrogates}
    stolen = _steal(context)
    sources[SUBSTITUTE] = (stolen.members, stolen.weights)
    service, labels, seed = context.service, context.engine.card.labels, config.seed
    eps, split, model = context.eps, context.split, targets["model"]
    with EvidenceWriter(evidence_folder(config.model), split, context.holdout) as evidence:
        outcomes = run_suite(
            context.suite, sources, targets, split, eps, seed=seed, keep=evidence.add
        )
        outcome = outcomes["model"]
        leakage = known_leakage([context.data.train, context.data.holdout], split)
        with counted(model.members or []) as gradients:
            checks = check(context, model, outcomes, control, leakage)
            measured = measure(context, model, outcome, evidence)
        spent = replace(
            context.price,
            attacks=stolen.gradients + sum(each.gradients for each in outcomes.values()),
            checks=gradients(),
        )
        table = assemble(context, outcomes, control, checks, measured)
        table["more_clean_images"] = more_clean_images(context, targets)
        table["substitute"] = {
            **stolen.to_json(),
            "agreement": stolen.agreement(context.engine, split),
            "robust_accuracy": under_substitute(outcome, context.suite, eps),
        }
        # The images of somebody else's data stay in the evidence folder: reports travel.
        own = config.labels is None
        table["examples"] = examples(outcomes, targets, split, labels, eps) if own else None
        table["evidence"] = evidence.index
        files = image_files(context.attacked, "test"), image_files(context.attacked, "train")
        table["leakage"] = leakage.to_json(*files)
        unanswered = None
        if service is not None:
            try:
                with service:
                    caller = Caller(context.data.holdout.to(split.device), context.training, seed)
                    table["live"] = attack_service(
                        service, split, outcome, context.engine.sha256, max(eps), caller
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
            "gradient_evaluations": spent.to_json(),
        }
        report = Report.from_json(nulls(table))
        say("drawing the report")
        plots = illustrate(report, labels, context.engine, model.members, split, outcome)
        written, shown = pretty_json(report.to_json()), page(report, plots)
        evidence.finish(plots)
    write_atomic(report_path(config.model), written)
    write_atomic(page_path(config.model), shown)
    add_report(config.model, context.engine.sha256, report.verdict)
    prune()
    if unanswered is not None:
        raise UserError(
            f"the live service: {unanswered.found}; {report_path(config.model)} has all the rest",
            unanswered.expected,
            unanswered.next_step,
        )
    return report


def _steal(context: Context) -> Substitute:
    """Train a substitute on the model's scores."""
    say("training a substitute on the model's answers")
    answers: Answers = "scores" if gives_scores(context.engine) else "labels"
    return steal(
        ask_engine(context.engine, answers),
        context.data.holdout.to(context.device),
        context.training,
        classes=len(context.engine.card.labels),
        queries=context.preset.substitute,
        answers=answers,
        seed=context.config.seed,
    )
