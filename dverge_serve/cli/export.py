"""The command that makes a model file: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dverge_serve.cli import app
from dverge_serve.errors import UserError


@app.command(epilog="Example: dverge export model.onnx --run runs/latest")
def export(
    model: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.onnx")],
    run: Annotated[Path, typer.Option(help="The finished run to export.")] = Path("runs/latest"),
    target: Annotated[
        str, typer.Option(help="Where it will run: auto (what is here), cpu or cuda.")
    ] = "auto",
    form: Annotated[
        str,
        typer.Option(help="auto (what measures faster), grouped (one network) or branches."),
    ] = "auto",
) -> None:
    """Fuse a run into one ONNX file.

    The graph averages the members' logits; it is checked against torch before it gets its name.
    """
    if model.suffix != ".onnx":
        raise UserError(f"'{model}' as the model's name", "a file name ending in .onnx")
    from dverge_serve.device import Device
    from export.choice import Ask
    from export.export import export as export_run
    from training.run import Run

    on: Device = _one_of(Device, "--target", target)
    ask: Ask = _one_of(Ask, "--form", form)
    done = export_run(Run.open_finished(run), model, form=ask, target=on)
    size = model.stat().st_size / 1e6
    typer.echo(f"wrote {model} ({size:.1f} MB), {done.choice}; equal to torch: {done.parity}")


def _one_of(kind: Any, option: str, value: str) -> Any:
    if value not in get_args(kind):
        raise UserError(f"{option} {value}", f"one of {', '.join(get_args(kind))}")
    return value
