"""The command that logs a model in MLflow: mlflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import Model
from dverge_serve.cli.panels import InPanels


@app.command(cls=InPanels, epilog="Example: dverge mlflow model.onnx --tracking-uri mlruns")
def mlflow(
    model: Model = Path("model.onnx"),
    run: Annotated[
        Path | None, typer.Option(help="The run it was exported from. [default: found in runs/]")
    ] = None,
    tracking_uri: Annotated[
        str, typer.Option(help="A server's address, or a folder. [default: $MLFLOW_TRACKING_URI]")
    ] = "",
    experiment: Annotated[
        str, typer.Option(help="Its name. [default: $MLFLOW_EXPERIMENT_NAME, or Default]")
    ] = "",
) -> None:
    """Log a model with its run and report in MLflow.

    Parameters, metrics by epoch, the report's figures, the files beside the model, and the model
    with a schema, to be loaded from there.
    """
    from verification.mlflow import DEFAULTS, log_to_mlflow

    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    done = log_to_mlflow(model, run=run, tracking_uri=tracking_uri, experiment=experiment)
    typer.echo(f"logged as run {done.run_id}, the model as {done.model_uri}")
