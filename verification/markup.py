"""HTML of which a report is made: tables, plots, figures with their intervals."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CAPTIONS = {
    "curves": "Accuracy on the test images as the attacker is allowed more change. Bands are "
    "Wilson 95% intervals. The control is the same kind of ensemble without the defence.",
    "matrices": "Left: how often an image made to fool one member (row) also fools another "
    "(column), on images that all get right. Right: how differently two members see.",
    "regions": "What each member answers around a test image (the cross): one colour a class, "
    "the horizontal axis along the sign of the ensemble's gradient, in units of pixel change.",
    "pictures": "Test images, versions that fool the model, and what was changed (grey is none).",
}


def plot(name: str, plots: Mapping[str, bytes], heading: str = "") -> str:
    """Return the named plot as a figure with its caption, or nothing where it is not there."""
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name]).decode()
    above = f"<h2>{escape(heading)}</h2>" if heading else ""
    return (
        f'{above}<figure><img alt="{escape(CAPTIONS[name])}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of escaped cells; columns in `numbers` are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if at in numbers else ''}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    top = f"<tr>{cells('th', head)}</tr>" if any(head) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def bullets(items: Sequence[str]) -> str:
    """Return a list of escaped items."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def percent(rate: dict[str, Any] | None) -> str:
    """Return a rate of the report in percent, `-` where it was not measured."""
    return "-" if not rate or rate["value"] is None else f"{100 * rate['value']:.1f}%"


def interval(rate: dict[str, Any] | None, places: int = 1, times: int = 100) -> str:
    """Return a rate with its interval, `value (low-high)`, in hundredths unless told otherwise."""
    if not rate:
        return "not run"
    if rate["value"] is None:
        return "-"
    value, low, high = (f"{times * rate[key]:.{places}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def versions(rate: dict[str, Any] | None) -> str:
    """Return a rate of the float images and of the delivered ones, in percent."""
    return f"{100 * rate['float']:.1f} / {100 * rate['delivered']:.1f}" if rate else "-"
