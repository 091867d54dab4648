"""HTML of which a report is made: tables, plots, figures with their intervals."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Of each plot: the words that stand for it where it is not seen, and its caption.
PLOTS = {
    "curves": (
        "Chart: accuracy against eps; the tables give the figures.",
        "Accuracy on the test images as the attacker is allowed more change. Bands are "
        "Wilson 95% intervals. The control is the same kind of ensemble without the defence.",
    ),
    "matrices": (
        "Two grids of numbers, members by members.",
        "Left: how often an image made to fool one member (row) also fools another "
        "(column), on images that all get right. Right: how differently two members see.",
    ),
    "regions": (
        "Maps of the answers around some test images, one for each member and one for all.",
        "What each member answers around a test image (the cross): one colour a class, "
        "the horizontal axis along the sign of the ensemble's gradient, in units of pixel change.",
    ),
    "pictures": (
        "Rows of pictures: clean, attacked, difference.",
        "Test images, versions that fool the model, and what was changed (grey is none).",
    ),
}


def plot(name: str, plots: Mapping[str, bytes], heading: str = "") -> str:
    """Return the named plot as a figure with its caption, or nothing where it is not there."""
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name]).decode()
    above = f"<h2>{escape(heading)}</h2>" if heading else ""
    unseen, caption = map(escape, PLOTS[name])
    return (
        f'{above}<figure><img alt="{unseen}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of escaped cells, the first of a row its heading, `numbers` to the right."""

    def cells(row: Sequence[str], scope: str = "") -> str:
        return "".join(
            _cell(escape(text), scope or ("" if at else "row"), "n" if at in numbers else "")
            for at, text in enumerate(row)
        )

    top = [cells(head, "col")] if any(head) else []
    return scrolled([*top, *map(cells, rows)], ", ".join(filter(None, head)))


def _cell(inside: str, scope: str, kind: str) -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<th scope="{scope}"{shown}>{inside}</th>' if scope else f"<td{shown}>{inside}</td>"


def scrolled(rows: Sequence[str], told: str) -> str:
    """Return a table of finished rows in a box that scrolls, by keyboard too, if it is wide."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    name = f"Table: {escape(told)}" if told else "Table"
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}">'
        f"<table>{body}</table></div>"
    )


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
