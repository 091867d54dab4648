"""The command that classifies images without a server: predict."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import AsJson, Model
from dverge_serve.errors import UserError

if TYPE_CHECKING:
    from dverge_serve.engine.session import Engine

PREDICTED = ("label", "index", "probability", "agreement", "disagreement")  # of a `Prediction`


@app.command(epilog="Example: dverge predict model.onnx photos/ --csv answers.csv")
def predict(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders of them.")],
    as_json: AsJson = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the answers into this file.")
    ] = None,
) -> None:
    """Classify images without a server."""
    from dverge_serve.engine.session import Engine
    from dverge_serve.files import atomic_path

    if csv_file is not None and not csv_file.parent.is_dir():
        raise UserError(f"no folder {csv_file.parent} for --csv", "a file in one that is there")
    files = _image_files(paths)
    rows = _predict(Engine(model, device="cpu"), files)
    if csv_file is not None:
        names = ["image", *PREDICTED, "error"]
        with (
            atomic_path(csv_file) as part,
            part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        typer.echo(f"wrote {csv_file}: {len(rows)} image{'s' * (len(rows) != 1)}", err=True)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif csv_file is None:
        from dverge_serve.cli.tables import predictions_table

        predictions_table(rows)
    unread = [row for row in rows if "error" in row]
    if unread:
        raise UserError(
            f"{len(unread)} of {len(rows)} images cannot be read, first {unread[0]['image']} "
            f"({unread[0]['error']})",
            "whole PNG, JPEG or WebP files",
        )


def _image_files(paths: list[Path]) -> list[Path]:
    from dverge_serve.image_folder import find_images, told
    from dverge_serve.progress import say

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = find_images(path)
            if not found.paths:
                raise UserError(f"no image in {path}", "PNG, JPEG or WebP files")
            if found.left_out:
                say(f"{path}: {told(found.left_out)}")
            files += found.paths
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"no file {path}", "image files or folders of them")
    return files


def _predict(engine: Engine, files: list[Path]) -> list[dict[str, Any]]:
    import numpy as np

    from dverge_serve.engine.predictions import Predictions
    from dverge_serve.engine.session import PREDICT_BATCH
    from dverge_serve.images import ImageError, to_float, to_pixels
    from dverge_serve.progress import Progress

    rows: list[dict[str, Any]] = []
    with Progress("classifying", len(files)) as progress:
        for start in range(0, len(files), PREDICT_BATCH):
            batch: list[dict[str, Any]] = []
            pixels = []
            for file in files[start : start + PREDICT_BATCH]:
                batch.append({"image": str(file)})
                try:
                    pixels.append(to_pixels(file, engine.card.preprocess))
                except (ImageError, OSError) as error:
                    batch[-1]["error"] = str(error)
            if pixels:
                found = Predictions(engine.run(to_float(np.stack(pixels))), engine.card.labels)
                read = [row for row in batch if "error" not in row]
                for row, prediction in zip(read, found, strict=True):
                    row |= {key: getattr(prediction, key) for key in PREDICTED}
            rows += batch
            progress.advance(len(batch))
    return rows
