"""The command that says what a model file is: inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import AsJson, Model
from dverge_serve.errors import UserError


@app.command(epilog="Example: dverge inspect model.onnx --json")
def inspect(
    model: Model,
    as_json: AsJson = False,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Say what it was made from, and how.")
    ] = False,
) -> None:
    """Say what a model file is.

    Labels, input, members, training and, where a matching report is beside it, robustness.
    """
    from dverge_serve.engine.report import headline, no_report, read_report
    from dverge_serve.engine.session import Engine

    engine = Engine(model, device="cpu")
    card, report = engine.card, read_report(model, engine.sha256)
    if provenance:
        _show_provenance(model, engine.sha256, report, as_json=as_json)
        return
    if as_json:
        robustness = None if report is None else headline(report)
        whole = {"sha256": engine.sha256, **card.to_json(), "robustness": robustness}
        typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    from dverge_serve.cli.tables import card_table

    labels = card.labels
    facts = {
        "name": card.name,
        "sha256": engine.sha256,
        "labels": f"{len(labels)}: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}",
        "input": f"{card.channel_order} {'x'.join(map(str, card.input_shape))}",
        "members": f"{card.members}, {card.training.get('architecture', '?')}",
        "combination": card.combination,
        "method": card.training.get("method", "?"),
        "data set": card.dataset,
        "precision": card.precision,
        "written by": f"dverge {card.tool_version}",
        **(_robustness(report) if report else {"robustness": no_report(model)}),
    }
    card_table(facts)


def _show_provenance(
    model: Path, sha256: str, report: dict[str, Any] | None, *, as_json: bool
) -> None:
    from dverge_serve.cli.tables import card_table
    from dverge_serve.engine.provenance import facts, provenance_path, read_provenance

    found = read_provenance(model, sha256)
    if found is None:
        raise UserError(
            f"no provenance of this file in {provenance_path(model)}",
            "the statement that `dverge export` writes",
            "export the model again",
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        card_table({"sha256": sha256, **facts(found, report)})


def _robustness(table: dict[str, Any]) -> dict[str, str]:
    from dverge_serve.cli.tables import interval
    from dverge_serve.engine.report import Report

    verdict = f"verified, {table.get('verdict', 'unknown')}"
    try:
        report = Report.from_json(table)
    except UserError:
        return {"robustness": f"{verdict}; the report lacks figures that this version shows"}
    facts = {"robustness": verdict, "  clean accuracy": interval(report.clean_accuracy)}
    for eps, row in report.robust_accuracy.items():
        told = f"transfer {interval(row.transfer)}, white-box {interval(row.white_box)}"
        facts[f"  at eps {report.radius(eps)}"] = told
    return facts
