"""The model card for people and hubs: Markdown with Hugging Face's metadata."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from dverge_serve.engine.card import Card
from dverge_serve.engine.rates import Rate
from dverge_serve.engine.report import Report
from dverge_serve.errors import printable

TASK = "image-classification"
TAGS = ["onnx", "ensemble", "adversarial-robustness", TASK]
_NOTHING = dict.fromkeys(("licence", "train_images", "holdout_images", "sha256"))
WORDS = {True: "passed", False: "FAILED", None: "not run"}


def model_card(
    card: Card, sha256: str, report: Report | None, provenance: Mapping[str, Any] | None
) -> str:
    """Return the card of a model.

    Args:
        card: the model file's metadata.
        sha256: of the model file.
        report: of this file, if there is one.
        provenance: of this file, if there is one.
    """
    definition = provenance["predicate"]["buildDefinition"] if provenance else {}
    data = definition.get("resolvedDependencies", [{}])[0]
    inside = definition.get("internalParameters", {})
    licence = inside.get("licence", "")
    settings = card.training
    architecture = settings.get("architecture", "unknown architecture")
    names = [architecture] if isinstance(architecture, str) else architecture
    told = {key: settings.get(key) for key in ("width", "batch_size", "seed")}
    told |= inside.get("training", {}).get("hardware", {})
    values = {
        "card": card,
        "sha256": sha256,
        "architecture": ", ".join(dict.fromkeys(names)),
        "method": settings.get("method", "unknown"),
        "licence": licence,
        "data": _NOTHING | data.get("annotations", {}) | data.get("digest", {}),
        "training": {
            name.replace("_", " "): value for name, value in told.items() if value is not None
        },
        "provenance": provenance,
        "report": report,
        "words": WORDS,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dverge_serve.engine"),
        autoescape=False,  # noqa: S701 - Markdown; `_text` escapes what is anybody's
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("model_card.md.jinja")
    return _front(card, licence, report) + template.render(values | _figures(report))


def _figures(report: Report | None) -> dict[str, Any]:
    """Return what the template shows of a report."""
    if report is None:
        return {}
    control, table = report.control, report.to_json()
    rows = [
        {
            "radius": report.radius(eps),
            "transfer": _interval(row.transfer),
            "white_box": _interval(row.white_box),
            "control": _interval(control.robust_accuracy[eps].transfer if control else None),
        }
        for eps, row in report.robust_accuracy.items()
    ]
    largest = max(report.robust_accuracy)
    worst = report.robust_accuracy[largest].white_box
    return {
        "rows": rows,
        "largest": report.radius(largest),
        "white_box": worst and worst.percent,
        "limits": table.get("out_of_scope", []),
        "identifiers": table.get("identifiers", {}),
        "queries": [
            {
                "answers": asked.answers,
                "radius": report.radius(asked.eps),
                "queries": asked.points[-1].queries,
                "rate": asked.points[-1].interval,
            }
            for asked in report.by_queries
        ],
    }


def _interval(rate: Rate | None) -> str:
    return "not run" if rate is None else rate.interval


def _front(card: Card, licence: str, report: Report | None) -> str:
    """Return the metadata block. JSON is YAML: each value is written as JSON, safe to read back."""
    lines: dict[str, Any] = {"pipeline_tag": TASK, "library_name": "onnx"}
    lines["tags"] = [*TAGS, str(card.training.get("method", "unknown"))]
    if licence:
        # Hubs know identifiers, in lower case; anything else is "other" with a name.
        known = re.fullmatch(r"[A-Za-z0-9.+-]+", licence)
        lines["license"] = licence.lower() if known else "other"
        lines |= {} if known else {"license_name": licence}
    if report is not None:
        lines["metrics"] = ["accuracy"]
        lines["model-index"] = [{"name": card.name, "results": [_result(report)]}]
    rows = (f"{key}: {json.dumps(value, ensure_ascii=True)}\n" for key, value in lines.items())
    return f"---\n{''.join(rows)}---\n\n"


def _result(report: Report) -> dict[str, Any]:
    figures: dict[str, Rate | None] = {"clean accuracy": report.clean_accuracy}
    for eps, row in report.robust_accuracy.items():
        where = f"{report.norm} eps {eps:g}"
        figures[f"robust accuracy, transfer attacks, {where}"] = row.transfer
        figures[f"robust accuracy, white-box attacks, {where}"] = row.white_box
    data = report.data
    return {
        "task": {"type": TASK},
        "dataset": {"name": data.name, "type": data.name, "split": data.part},
        "metrics": [
            {"type": "accuracy", "name": name, "value": round(rate.value, 4)}
            for name, rate in figures.items()
            if rate is not None
        ],
    }


def _text(value: Any) -> Any:
    """Return a value as one line of Markdown: names of classes and data sets are anybody's."""
    if not isinstance(value, str):
        return value
    line = html.escape(" ".join(printable(value).split()), quote=False)
    return re.sub(r"([|`*_\[\]])", r"\\\1", line)
