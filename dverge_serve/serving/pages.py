"""Pages for browsers, from Jinja2 templates: every value escaped, no outside resource."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.model_report import ModelReport
from dverge_serve.serving.responses import HTML, Response
from dverge_serve.serving.settings import Exposure

TEMPLATES = files("dverge_serve.serving") / "templates"
PAGES = Environment(
    loader=PackageLoader("dverge_serve.serving"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
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
    style = _text("start.css")
    return _page(
        "start.html",
        _policy(f"style-src {_source(style)}"),
        title=served.card.name if served else "DVERGE Serve",
        style=style,
        facts=_facts(served, expose) if served else [],
        host=host if PLAIN_HOST.fullmatch(host) else "localhost:3000",
    )


@cache
def demo_page() -> Response:
    """Return the page to try images on; its script asks the service for all it shows."""
    style, script = _text("demo.css"), _text("demo.js")
    policy = _policy(
        f"style-src {_source(style)}",
        f"script-src {_source(script)}",
        "connect-src 'self'",
        "img-src blob: data:",  # the caller's own picture, and the examples
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    examples = [
        (words, base64.b64encode((TEMPLATES / "examples" / f"{name}.png").read_bytes()).decode())
        for name, words in EXAMPLES.items()
    ]
    return _page("demo.html", policy, style=style, script=script, examples=examples)


def _page(template: str, policy: bytes, **values: object) -> Response:
    page = PAGES.get_template(template).render(values)
    return Response(200, page.encode(), HTML, ((b"content-security-policy", policy),))


def _facts(served: ServedModel, expose: Exposure) -> list[tuple[str, str]]:
    card = served.card
    channels, height, width = card.input_shape
    labels = ", ".join(card.labels[:MOST_LABELS])
    if len(card.labels) > MOST_LABELS:
        labels += f" and {len(card.labels) - MOST_LABELS} more"
    return [
        ("Classes", f"{len(card.labels)}: {labels}"),
        ("Input", f"{width}x{height}, {'grayscale' if channels == 1 else 'colour'}"),
        ("Members", f"{card.members}, answering by the mean of their logits"),
        ("Trained on", card.dataset),
        ("Model file", f"sha256 {served.sha256}"),
        *([] if expose == "label" else _report(served.report)),
    ]


def _report(report: ModelReport) -> list[tuple[str, str]]:
    headline = report.headline
    if headline is None:
        foreign = "the report beside this model is about another file"
        why = foreign if report.state == "foreign" else "no report lies beside this model"
        return [("Robustness", f"not verified: {why}")]
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
    """Return the policy's source for an inline style or script, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _text(name: str) -> str:
    """Return a style or script of ours, which goes into a page as it is."""
    return (TEMPLATES / name).read_text(encoding="utf-8")
