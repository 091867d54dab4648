"""The command that packs a model file for shipping: bento."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import Model


@app.command(epilog="Example: dverge bento model.onnx")
def bento(
    model: Model = Path("model.onnx"),
    out: Annotated[
        Path, typer.Option(help="The folder to write bentofile.yaml and the rest into.")
    ] = Path("bento"),
    build: Annotated[bool, typer.Option(help="Build the Bento, or only write the folder.")] = True,
) -> None:
    """Build a Bento of a model file.

    It holds the installed package, the model, its report and what else belongs to it.
    Nothing is fetched from the network.
    """
    from dverge_serve.serving import bento as packing

    written = packing.write_bento(model, out)
    report = any(path.name.endswith(".report.json") for path in written)
    with_report = "with its report" if report else "without a report: none beside it is about it"
    typer.echo(f"wrote {written[0]} and {packing.MODEL} beside it, {with_report}")
    if build:
        tag = packing.build(out)
        typer.echo(f"built {tag}; serve it with: bentoml serve {tag}")
