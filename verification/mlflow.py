"""A model in MLflow: its settings, training curves, figures, files, and the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx

from dverge_serve.engine.card import Card
from dverge_serve.engine.model_card import WORDS
from dverge_serve.engine.model_file import read_model
from dverge_serve.engine.provenance import provenance_path, read_provenance
from dverge_serve.engine.rates import Accuracies, Rate
from dverge_serve.engine.report import Report, read_report, report_path
from dverge_serve.engine.session import Engine
from dverge_serve.engine.signature import covered, signature_path
from dverge_serve.errors import UserError, brief
from training.runs.tensorboard import scalars
from verification.gradients import find_run

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

NAME = "model"  # of the model in MLflow
# What the command sets of MLflow's own variables, where its user has not set them: a folder may be
# the store, nobody but the tracking server is told or asked anything, MLflow prints no addresses,
# and a server that does not answer is given up after seconds.
DEFAULTS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Logged(NamedTuple):
    """What MLflow calls a logged run and its model."""

    run_id: str
    model_uri: str  # what `mlflow.onnx.load_model` takes


def log_to_mlflow(
    model: Path, *, run: Path | None = None, tracking_uri: str = "", experiment: str = ""
) -> Logged:
    """Log a model and what belongs to it as one new run of MLflow.

    Parameters are the settings of the training and of the export; metrics are the training curves
    by epoch and the report's figures, which are the model's too; tags have verdict, gates and
    hashes; artefacts are the files that a signature covers, and the signature. The model is in the
    format of MLflow's ONNX flavour, with the bytes of the file and the schema of its inputs and
    outputs. If the server stops answering on the way, MLflow calls the run failed.

    Args:
        model: the ONNX file.
        run: the training run that it was exported from; by default the one with these weights,
            under `runs/` or beside the file. Without any there are no training curves.
        tracking_uri: a server's address or a folder; by default MLflow's own settings.
        experiment: its name; by default MLflow's own settings.

    Raises:
        UserError: no such model, a report or provenance of another file, another model's run, no
            tracking server named, or one that refuses.
    """
    with Engine(model, device="cpu") as engine:
        card, sha256 = engine.card, engine.sha256
    report, files = _report(model, sha256), _files(model, sha256)
    trained = find_run(card, model, run)
    metrics = trained.path / "metrics.jsonl" if trained else None
    lines = metrics.read_bytes().splitlines() if metrics and metrics.is_file() else []
    graph = onnx.load_from_string(read_model(model))
    import mlflow
    import mlflow.onnx

    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    elif not mlflow.is_tracking_uri_set():
        expected = "`tracking_uri` or MLFLOW_TRACKING_URI: a server's address, or a folder"
        raise UserError("no tracking server is named", expected)
    try:
        if experiment:
            mlflow.set_experiment(experiment)
        with mlflow.start_run(run_name=card.name, tags=_tags(card, sha256, report)) as active:
            mlflow.log_params(dict(_flat(_parameters(card))))
            logged = mlflow.onnx.log_model(
                graph,
                name=NAME,
                signature=_signature(graph),
                save_as_external_data=False,
                pip_requirements=mlflow.onnx.get_default_pip_requirements(),
                onnx_execution_providers=_providers(card),
            )
            for record in map(json.loads, lines):
                figures = {f"{record['stage']}/{tag}": value for tag, value in scalars(record)}
                mlflow.log_metrics(figures, step=record["epoch"])
            if report:
                mlflow.log_metrics(dict(_figures(report)), model_id=logged.model_id)
            for file in files:
                mlflow.log_artifact(str(file))
    # Some stores of artefacts need packages of their own.
    except (mlflow.MlflowException, ModuleNotFoundError) as error:
        cause: BaseException = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        away = f"cannot be reached ({cause})" if isinstance(cause, ConnectionError) else ""
        raise UserError(
            f"MLflow at {mlflow.get_tracking_uri()} {away or f'refused ({brief(error, 300)})'}",
            "a tracking server that takes runs and models, or a folder",
        ) from error
    return Logged(active.info.run_id, logged.model_uri)


def _report(model: Path, sha256: str) -> Report | None:
    table = read_report(model, sha256)
    return None if table is None else Report.from_json(table, str(report_path(model)))


def _files(model: Path, sha256: str) -> list[Path]:
    """Return what belongs to a model, its signature last."""
    for path, read in (
        (report_path(model), read_report),
        (provenance_path(model), read_provenance),
    ):
        if path.exists() and read(model, sha256) is None:
            raise UserError(f"{path} is not about {model}", "one of this very file", "remove it")
    signature = signature_path(model)
    return [*covered(model)[1:], *([signature] if signature.is_file() else [])]


def _tags(card: Card, sha256: str, report: Report | None) -> dict[str, str]:
    tags = {
        "dverge.sha256": sha256,
        "dverge.weights_sha256": card.weights_sha256,
        "dverge.version": card.tool_version,
    }
    if report is not None:
        tested = report.data
        tags["dverge.verdict"] = report.verdict
        tags["dverge.preset"] = report.preset
        tags["dverge.tested_on"] = f"{tested.name} {tested.part}, {tested.n} images"
        tags |= {f"dverge.gate.{gate.name}": WORDS[gate.passed] for gate in report.gates}
    return tags


def _parameters(card: Card) -> dict[str, Any]:
    export = {"form": card.form, "target": card.target, "precision": card.precision}
    about = {"members": card.members, "dataset": card.dataset, "source": card.source}
    return about | dict(card.training) | {"export": export}


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and text of each setting; names of sections come first, with dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value if isinstance(value, str) else json.dumps(value)


def _figures(report: Report) -> Iterator[tuple[str, float]]:
    """Yield name and value of each headline figure: accuracies in `[0,1]` with their intervals."""
    rates = dict(_rates(report, report.norm))
    if report.control is not None:
        control = _rates(report.control, report.norm)
        rates |= {f"control/{name}": rate for name, rate in control}
    for asked in report.by_queries:
        name = f"robust_accuracy/{asked.answers}/{report.norm}_{asked.eps:g}"
        rates |= {f"{name}/queries_{point.queries}": point for point in asked.points}
    for name, rate in rates.items():
        yield name, rate.value
        yield f"{name}_low", rate.low
        yield f"{name}_high", rate.high


def _rates(of: Accuracies, norm: str) -> Iterator[tuple[str, Rate]]:
    yield "clean_accuracy", of.clean_accuracy
    for eps, row in of.robust_accuracy.items():
        for threat, rate in vars(row).items():
            if rate is not None:
                yield f"robust_accuracy/{threat}/{norm}_{eps:g}", rate


def _providers(card: Card) -> list[str]:
    first = ["CUDAExecutionProvider"] if card.target == "cuda" else []
    return [*first, "CPUExecutionProvider"]


def _signature(graph: onnx.ModelProto) -> ModelSignature:
    """Return the schema of a graph's inputs and outputs; -1 is the batch."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(values: Any) -> Schema:
        specs = []
        for value in values:
            tensor = value.type.tensor_type
            shape = [each.dim_value or -1 for each in tensor.shape.dim]
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            specs.append(TensorSpec(kind, shape, value.name))
        return Schema(specs)

    return ModelSignature(schema(graph.graph.input), schema(graph.graph.output))
