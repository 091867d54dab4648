"""The command that writes a model's card: card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import Model


@app.command(epilog="Example: dverge card model.onnx --out model.md")
def card(
    model: Model = Path("model.onnx"),
    out: Annotated[
        Path | None, typer.Option(help="The file to write. [default: standard output]")
    ] = None,
) -> None:
    """Write a model's card, in Markdown.

    With Hugging Face's metadata; from the model file and, where they are beside it, its report and
    its provenance.
    """
    from dverge_serve.engine.model_card import model_card
    from dverge_serve.engine.provenance import read_provenance
    from dverge_serve.engine.report import Report, no_report, read_report
    from dverge_serve.engine.session import Engine
    from dverge_serve.files import write_atomic

    with Engine(model, device="cpu") as engine:
        about, sha256 = engine.card, engine.sha256
    table = read_report(model, sha256)
    report = None if table is None else Report.from_json(table)
    if report is None:
        typer.echo(f"{no_report(model)}: the card says that robustness was not measured", err=True)
    text = model_card(about, sha256, report, read_provenance(model, sha256))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(out, text.encode())
        typer.echo(f"wrote {out}")
