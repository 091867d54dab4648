"""The command that makes a model file: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.errors import UserError


@app.command(epilog="Example: dverge export model.onnx --run runs/latest")
def export(
    model: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.onnx")],
    run: Annotated[Path, typer.Option(help="The finished run to export.")] = Path("runs/latest"),
) -> None:
    """Fuse a run into one ONNX file.

    The graph averages the members' logits; it is checked against torch before it gets its name.
    """
    if model.suffix != ".onnx":
        raise UserError(f"'{model}' as the model's name", "a file name ending in .onnx")
    from export.export import export as export_run
    from training.run import Run

    parity = export_run(Run.open_finished(run), model)
    size = model.stat().st_size / 1e6
    typer.echo(f"wrote {model} ({size:.1f} MB), equal to torch: {parity}")
