"""The robustness report of a model file, read from the same folder."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


def report_path(model: Path) -> Path:
    """Return the path of the report of `model`: `model.report.json` for `model.onnx`."""
    return model.with_name(f"{model.stem}.report.json")


def page_path(model: Path) -> Path:
    """Return the path of the report of `model` as a page: `model.report.html`."""
    return model.with_name(f"{model.stem}.report.html")


def read_report(model: Path, model_sha256: str) -> dict[str, Any] | None:
    """Return the report of `model`, or None if there is none about exactly these bytes.

    A report counts only if it names `model_sha256` and has a schema this reader knows.
    """
    try:
        report = json.loads(report_path(model).read_bytes())
        matches = (
            report["model"]["sha256"] == model_sha256
            and 1 <= int(report["schema_version"]) <= SCHEMA_VERSION
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if matches else None


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of the report, as it ships in the package."""
    file = resources.files("dverge_serve.engine") / "report.schema.json"
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema
