"""The command that serves a model file over HTTP: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app


@app.command(epilog="Example: dverge serve model.onnx --port 8080")
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="The model file. [default: DVERGE_MODEL, else model.onnx]", metavar="MODEL.onnx"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.")] = 3000,
    workers: Annotated[
        int | None, typer.Option(help="How many processes. [default: DVERGE_WORKERS, else 1]")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Ask callers for this bearer token. [default: DVERGE_TOKEN, else none]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda. [default: DVERGE_DEVICE, else auto]")
    ] = None,
) -> None:
    """Serve the model over HTTP.

    What is not given here is taken from the environment, as with `bentoml serve`.
    """
    from dverge_serve.serving.launch import serve as launch

    raise typer.Exit(launch(host, port, model=model, workers=workers, token=token, device=device))
