"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(help="The model file.", metavar="MODEL.onnx")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[
    str | None,
    typer.Option(help="A folder of train/<class>/ and test/<class>/, a CSV file, or a set's name."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
SAME_COMMAND = "the same command goes on from what is done"
