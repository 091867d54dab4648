"""The command that makes a model file: export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dverge_serve.cli import app
from dverge_serve.errors import UserError

if TYPE_CHECKING:
    from export.source import ExportSource


@app.command(epilog="Example: dverge export model.onnx --run runs/latest")
def export(
    model: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.onnx")],
    run: Annotated[
        Path | None, typer.Option(help="The finished run to export.  [default: runs/latest]")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A published weights file of CIFAR ResNets, or a TOML list of safetensors "
            "members, in place of a run."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="A published checkpoint's classes: cifar10, or a file, one a line."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 (for GPUs) or int8 (for CPUs; needs the images).")
    ] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(help="Where int8's images are, if not where the run found them."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="Where it will run: auto (what is here), cpu or cuda.")
    ] = "auto",
    form: Annotated[
        str,
        typer.Option(
            help="auto (by a rule), grouped (one network), branches, or measure (what is faster "
            "here; the file may differ from time to time)."
        ),
    ] = "auto",
    licence: Annotated[
        str, typer.Option(help="The model's licence, e.g. Apache-2.0, for its provenance and card.")
    ] = "",
    data_licence: Annotated[str, typer.Option(help="The training images' licence.")] = "",
) -> None:
    """Fuse the members into one graph.

    The graph averages the members' logits; it is checked against torch before it gets its name.
    Its provenance is written beside it.
    """
    if model.suffix != ".onnx":
        raise UserError(f"'{model}' as the model's name", "a file name ending in .onnx")
    from export.exporter import export as export_model

    settings: dict[str, Any] = {"form": form, "target": target, "precision": precision}
    settings |= {"licence": licence, "data_licence": data_licence}
    done = export_model(_members(run, checkpoint, labels), model, data=data, **settings)
    size = model.stat().st_size / 1e6
    typer.echo(f"wrote {model} ({size:.1f} MB), {done}")


def _members(run: Path | None, checkpoint: Path | None, labels: str | None) -> Path | ExportSource:
    """Return what to export: a run's directory, or members from elsewhere.

    Raises:
        UserError: options that exclude each other, or a checkpoint that cannot be read.
    """
    if checkpoint is None:
        if labels is not None:
            raise UserError("--labels without --checkpoint", "a run, which knows its classes")
        return run or Path("runs/latest")
    if run is not None:
        raise UserError("--run and --checkpoint", "one of the two")
    from export.member_list import from_list
    from export.published_checkpoint import from_checkpoint

    if checkpoint.suffix == ".toml":
        if labels is not None:
            raise UserError(f"--labels beside {checkpoint}", "the labels in that list")
        return from_list(checkpoint)
    if labels is None:
        raise UserError(
            "--checkpoint without --labels", "--labels cifar10, or a file with one class a line"
        )
    return from_checkpoint(checkpoint, labels)
