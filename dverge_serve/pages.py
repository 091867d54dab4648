"""The pages a browser sees: no outside link, no script, every value escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from dverge_serve.answer import HTML, Answer
from dverge_serve.served import ServedModel

MOST_LABELS = 100


def start_page(served: ServedModel | None) -> Answer:
    """Return the start page; of the model it shows nothing where `served` is None."""
    style = _template("start.css")
    title = served.card.name if served else "DVERGE Serve"
    page = Template(_template("start.html")).substitute(
        title=html.escape(title),
        style=style,
        model=_model(served) if served else "",
        example="http://localhost:3000",
    )
    return Answer(200, page.encode(), HTML, ((b"content-security-policy", _policy(style)),))


def _model(served: ServedModel) -> str:
    card = served.card
    channels, height, width = card.input_shape
    labels = ", ".join(card.labels[:MOST_LABELS])
    if len(card.labels) > MOST_LABELS:
        labels += f" and {len(card.labels) - MOST_LABELS} more"
    rows = [
        ("Classes", f"{len(card.labels)}: {labels}"),
        ("Input", f"{width}x{height}, {'grayscale' if channels == 1 else 'colour'}"),
        ("Members", f"{card.members}, answering by the mean of their logits"),
        ("Trained on", card.dataset),
        ("Model file", f"sha256 {served.sha256}"),
        *_report(served.headline),
    ]
    cells = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>\n'
        for name, text in rows
    )
    return f"<table>\n{cells}</table>"


def _report(headline: dict[str, Any] | None) -> list[tuple[str, str]]:
    if headline is None:
        return [("Robustness", "not verified: no report lies beside this model")]
    rows = [("Verification", str(headline.get("verdict", "unknown")))]
    if isinstance(headline.get("clean_accuracy"), dict):
        rows.append(("Clean accuracy", _figure(headline["clean_accuracy"])))
    for row in headline.get("robust_accuracy") or []:
        parts = [
            f"{_figure(row[key])} under {what}"
            for key, what in (("transfer", "transfer attack"), ("white_box", "white-box attack"))
            if isinstance(row.get(key), dict)
        ]
        rows.append((f"Robust accuracy, eps {row.get('eps')}", "; ".join(parts)))
    return rows


def _figure(figure: dict[str, Any]) -> str:
    try:
        value, low, high = (float(figure[key]) for key in ("value", "low", "high"))
    except (KeyError, TypeError, ValueError):
        return "?"
    return f"{value:.1%} ({low:.1%} to {high:.1%}, n={figure.get('n', '?')})"


def _policy(style: str) -> bytes:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ).encode()


@cache
def _template(name: str) -> str:
    return files("dverge_serve").joinpath("templates", name).read_text(encoding="utf-8")
