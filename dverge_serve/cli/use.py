"""Commands that use a model file: serve, predict, inspect. None of them needs torch."""

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


@app.command(epilog="Example: dverge inspect model.onnx --json")
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Say what a model file is.

    Labels, input, members, training and, where a matching report is beside it, robustness.
    """
    from dverge_serve.engine.report_reader import read_report
    from dverge_serve.engine.session import Engine

    engine = Engine(model, device="cpu")
    card, report = engine.card.to_json(), read_report(model, engine.sha256)
    if as_json:
        robustness = report and {
            key: report[key] for key in ("verdict", "clean_accuracy", "robust_accuracy")
        }
        whole = {"sha256": engine.sha256, **card, "robustness": robustness}
        typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    from dverge_serve.cli.tables import card_table, interval

    labels = engine.card.labels
    facts: dict[str, Any] = {
        "name": engine.card.name,
        "sha256": engine.sha256,
        "labels": f"{len(labels)}: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}",
        "input": f"{engine.card.channel_order} {'x'.join(map(str, engine.card.input_shape))}",
        "members": f"{engine.card.members}, {engine.card.training.get('architecture', '?')}",
        "combination": engine.card.combination,
        "method": engine.card.training.get("method", "?"),
        "data set": engine.card.dataset,
        "precision": engine.card.precision,
        "written by": f"dverge {engine.card.tool_version}",
        "robustness": f"verified, {report['verdict']}" if report else "no report for this file",
    }
    if report:
        from verification import Report

        found = Report.from_json(report)
        facts["  clean accuracy"] = interval(found.clean_accuracy)
        for eps, row in found.robust_accuracy.items():
            told = f"transfer {interval(row.transfer)}, white-box {interval(row.white_box)}"
            facts[f"  at eps {eps:g}"] = told
    card_table(facts)


def _image_files(paths: list[Path]) -> list[Path]:
    from dverge_serve.images import image_paths

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = image_paths(path)
            if not found:
                raise UserError(f"no image in {path}", "PNG, JPEG or WebP files")
            files += found
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
