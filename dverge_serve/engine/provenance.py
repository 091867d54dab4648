"""The provenance of a model file: an in-toto statement with SLSA's predicate, beside the model.

`model.provenance.json` says what `model.onnx` was made from and how: data, code, settings, members,
parity, hardware. `dverge export` writes it, and a verification adds the report. It holds no time of
day, so that equal exports have equal statements.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dverge_serve.engine.card import OPSET, Card
from dverge_serve.engine.report import report_path
from dverge_serve.files import pretty_json, sha256, write_atomic

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "pkg:pypi/dverge-serve#export-v1"
ROOMS = ("dverge_serve", "training", "export", "verification")
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")


def provenance_path(model: Path) -> Path:
    """Return the path of the provenance of `model`: `model.provenance.json` for `model.onnx`."""
    return model.with_name(f"{model.stem}.provenance.json")


def statement(
    card: Card,
    file: str,
    file_sha256: str,
    *,
    trained: Mapping[str, Any],
    parity: Mapping[str, Any],
    licence: str = "",
    data_licence: str = "",
) -> dict[str, Any]:
    """Return the provenance of a model file that was just exported.

    Args:
        card: of the file.
        file: its name.
        file_sha256: its hash.
        trained: what the run recorded of its training (`checkpoint.json`); empty for members from
            elsewhere.
        parity: how the file was compared with the network.
        licence: of the model, e.g. an SPDX identifier; empty if nobody said.
        data_licence: of the training images.
    """
    counts = {key: trained.get(key) for key in ("train_images", "holdout_images", "class_counts")}
    data = {
        "name": card.dataset,
        "digest": _known(sha256=card.training.get("train_sha256")),
        "annotations": _known(**counts, licence=data_licence or None),
    }
    training = _known(
        tool_version=trained.get("tool_version"),
        parameters=trained.get("parameters"),
        holdout_accuracy=trained.get("holdout_accuracy"),
        hardware=trained.get("provenance"),
    )
    return {
        "_type": STATEMENT,
        "subject": [{"name": file, "digest": {"sha256": file_sha256}}],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "training": card.training,
                    "export": {
                        "form": card.form,
                        "target": card.target,
                        "precision": card.precision,
                    },
                },
                "internalParameters": _known(
                    source=card.source,
                    opset=OPSET,
                    parent_sha256=card.parent_sha256,
                    parity={"probe": card.probe, **parity},
                    training=training,
                    licence=licence or None,
                ),
                "resolvedDependencies": [
                    data,
                    {"name": "members", "digest": {"sha256": card.weights_sha256}},
                    *(
                        {"name": start["file"], "digest": {"sha256": start["sha256"]}}
                        for start in trained.get("start", ())
                    ),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"pkg:pypi/dverge-serve@{card.tool_version}",
                    "version": installed(),
                    "builderDependencies": [
                        {"name": "dverge-serve", "digest": {"sha256": code_sha256()}}
                    ],
                },
                "byproducts": [],
            },
        },
    }


def installed() -> dict[str, str]:
    """Return the versions of Python and of the packages that exports depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if any(metadata.distributions(name=name)):
            found[name] = metadata.version(name)
    return found


def code_sha256() -> str:
    """Return a hash of the source of the installed rooms, by names and contents."""
    rows = []
    folder = Path(__file__).parents[2]
    for room in ROOMS:
        for file in sorted((folder / room).rglob("*.py")):
            rows.append(f"{sha256(file.read_bytes())}  {file.relative_to(folder).as_posix()}\n")
    return sha256("".join(rows).encode())


def read_provenance(model: Path, model_sha256: str) -> dict[str, Any] | None:
    """Return the provenance beside `model`, or None if none is about exactly these bytes."""
    try:
        found: dict[str, Any] = json.loads(provenance_path(model).read_bytes())
        (subject,) = found["subject"]
        matches = subject["digest"]["sha256"] == model_sha256
        known = found["predicateType"] == PREDICATE and "buildDefinition" in found["predicate"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if matches and known else None


def add_report(model: Path, model_sha256: str, verdict: str) -> None:
    """Name the report of `model` in its provenance, in place of an older report, if it has any.

    Args:
        model: the model file; its report is beside it.
        model_sha256: its hash.
        verdict: of the report.
    """
    found, report = read_provenance(model, model_sha256), report_path(model)
    if found is None:
        return
    found["predicate"]["runDetails"]["byproducts"] = [
        {
            "name": report.name,
            "digest": {"sha256": sha256(report.read_bytes())},
            "annotations": {"verdict": verdict},
        }
    ]
    write_atomic(provenance_path(model), pretty_json(found))


def facts(found: Mapping[str, Any], report: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a statement for people: one fact a line, the most asked for first.

    Args:
        found: from `read_provenance`.
        report: of the same model, as `read_report` returns it.
    """
    definition = found["predicate"]["buildDefinition"]
    data, *materials = definition["resolvedDependencies"]
    notes, inside = data.get("annotations", {}), definition["internalParameters"]
    settings = definition["externalParameters"]["training"]
    parity, training = inside["parity"], inside.get("training", {})
    builder = found["predicate"]["runDetails"]["builder"]
    (code,) = builder["builderDependencies"]
    told = {
        "images": notes.get("train_images"),
        "held out": notes.get("holdout_images"),
        "licence": notes.get("licence", "not stated"),
    }
    rows = {
        "data set": _row(data["name"], told | data.get("digest", {})),
        "classes": _row("", notes.get("class_counts", {})),
        "settings": _row(
            settings.get("method", "?"),
            {key: settings.get(key) for key in ("architecture", "members", "seed")},
        ),
        **{each["name"]: _row("", each["digest"]) for each in materials},
        "trained on": _row("", training.get("hardware", {})),
        "export": _row("", definition["externalParameters"]["export"]),
        "parity": _row("", parity),
        "code": _row(builder["id"], code["digest"]),
        "versions": _row("", builder["version"]),
        "licence": inside.get("licence", "not stated"),
    }
    if report is not None:
        tested, run = report["data"], report["run"]
        rows["report"] = _row(report["verdict"], {key: report[key] for key in ("preset", "seed")})
        rows["tested on"] = _row(
            tested["name"], {key: tested[key] for key in ("part", "n", "sha256")}
        )
        rows["attacked on"] = _row(
            "", {key: run.get(key) for key in ("machine", "cores", "device")}
        )
    return {name: row for name, row in rows.items() if row}


def _row(first: str, others: Mapping[str, Any]) -> str:
    told = (
        f"{name.replace('_', ' ')} {value}" for name, value in others.items() if value is not None
    )
    return ", ".join([*([first] if first else []), *told])


def _known(**values: Any) -> dict[str, Any]:
    """Return what is not None."""
    return {key: value for key, value in values.items() if value is not None}
