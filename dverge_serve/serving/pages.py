"""The pages a browser sees: no outside link, nothing that was not shipped, every value escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.responses import HTML, Response
from dverge_serve.serving.settings import Exposure

TEMPLATES = files("dverge_serve.serving").joinpath("templates")
MOST_LABELS = 100
# A name that does no harm in the shell into which the page's example is pasted.
PLAIN_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
# Pictures drawn for the demo page, 8x8 as the embedded digits are; no data set holds them.
EXAMPLES = {
    **{str(digit): f"a {digit}" for digit in range(10)},
    "5-over-6": "a 5 laid over a 6",
}


def start_page(served: ServedModel | None, expose: Exposure, host: str) -> Response:
    """Return the start page; of the model it shows nothing where `served` is None.

    Args:
        served: the model.
        expose: how much of it callers may see.
        host: by which name the caller reached the service, as the header has it.
    """
    style = _template("start.css")
    title = served.card.name if served else "DVERGE Serve"
    page = Template(_template("start.html")).substitute(
        title=html.escape(title),
        style=style,
        model=_model(served, expose) if served else "",
        host=html.escape(host if PLAIN_HOST.fullmatch(host) else "localhost:3000"),
    )
    policy = _policy(f"style-src {_source(style)}")
    return Response(200, page.encode(), HTML, ((b"content-security-policy", policy),))


@cache
def demo_page() -> Response:
    """Return the page to try images on; it asks for all it shows of the model, token in hand."""
    style, script = _template("demo.css"), _template("demo.js")
    page = Template(_template("demo.html")).substitute(
        style=style, script=script, examples="\n".join(map(_example, EXAMPLES))
    )
    policy = _policy(
        f"style-src {_source(style)}",
        f"script-src {_source(script)}",
        "connect-src 'self'",
        "img-src blob: data:",  # the caller's own picture, and the examples
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return Response(200, page.encode(), HTML, ((b"content-security-policy", policy),))


def _example(name: str) -> str:
    """Return a button with an example picture; the script shows those the model can answer."""
    picture = TEMPLATES.joinpath("examples", f"{name}.png").read_bytes()
    words = html.escape(EXAMPLES[name])
    data = base64.b64encode(picture).decode()
    return (
        f'<li><button type="button" class="example" title="{words}">'
        f'<img alt="{words}" src="data:image/png;base64,{data}"></button></li>'
    )


def _model(served: ServedModel, expose: Exposure) -> str:
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
        *([] if expose == "label" else _report(served.headline)),
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


def _policy(*sources: str) -> bytes:
    closed = ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return "; ".join(("default-src 'none'", *sources, *closed)).encode()


def _source(text: str) -> str:
    """Return the policy's name for an inline style or script: these bytes and no others."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _template(name: str) -> str:
    return TEMPLATES.joinpath(name).read_text(encoding="utf-8")
