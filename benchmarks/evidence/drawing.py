"""The page's plots: small SVG files, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.evidence.paired import share, stack
from benchmarks.evidence.record import fingerprint
from benchmarks.evidence.tables import METHODS, THREATS, Variants
from verification.report.plots import GRID, INK, STYLE

# Told apart by hue, lightness and marker.
LOOKS = {
    "standard-3": ("#7b8794", "s"),
    "adp-3": ("#b58900", "v"),
    "gal-3": ("#8a5a9e", "^"),
    "dverge-3": ("#0b6e99", "o"),
    "adversarial-3": ("#b3400e", "D"),
    "dverge+adversarial-3": ("#2f7d32", "P"),
    "transfer-3": ("#c2528b", "X"),
    "dverge+transfer-3": ("#1f2d3d", "h"),
}
Lines = dict[str, list[tuple[float, float, float, float]]]  # name -> x, value, low, high; percent


def against_eps(variants: Variants, threat: str) -> Lines:
    """Return each method's accuracy against eps, clean at 0."""
    lines: Lines = {}
    for name in METHODS:
        if records := variants.get(name):
            found = [(0.0, share(stack(records, "clean")))]
            found += [(eps, share(stack(records, threat, eps))) for eps in records[0]["eps"]]
            lines[name] = [(x, 100 * s.value, 100 * s.low, 100 * s.high) for x, s in found]
    return lines


def against_members(variants: Variants, threat: str, eps: float) -> Lines:
    """Return accuracy against the number of members, with DVERGE and without."""
    lines: Lines = {}
    for method in ("dverge", "standard"):
        for members in (2, 3, 5, 8):
            if records := variants.get(f"{method}-{members}"):
                s = share(stack(records, threat, eps))
                line = lines.setdefault(f"{method}-3", [])
                line.append((members, 100 * s.value, 100 * s.low, 100 * s.high))
    return lines


def plot(panels: Mapping[str, Lines], across: str) -> bytes:
    """Return one SVG with a panel for each set of lines.

    The figures' hash is in the file, so that a page and its plots can be held together.

    Args:
        panels: titles to lines.
        across: what runs along the bottom.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": "dverge", "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        drawn: dict[str, Any] = {}
        for at, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), at + 1)
            for name, line in lines.items():
                drawn[name] = _line(axes, name, line)
            axes.set_title(title, fontsize=9, color=INK, loc="left")
            axes.set_ylim(0, 102)
            axes.set_xlabel(across)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            xs = sorted({point[0] for line in lines.values() for point in line})
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            if at == 0:
                axes.set_ylabel("images answered rightly, %")
        names = [METHODS[name].strip("*") for name in drawn]
        figure.legend(drawn.values(), names, loc="outside lower center", ncol=3, frameon=False)
        out = io.BytesIO()
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Description": key(panels)}
        )
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"


def key(panels: Mapping[str, Lines]) -> str:
    """Return the hash of what a plot shows."""
    rounded: dict[str, dict[str, Sequence[Sequence[float]]]] = {
        title: {
            name: [[round(value, 6) for value in point] for point in line]
            for name, line in lines.items()
        }
        for title, lines in panels.items()
    }
    return fingerprint(rounded)


def panels(variants: Variants) -> dict[str, tuple[dict[str, Lines], str]]:
    """Return what is drawn of a data set: file name to panels and what runs along the bottom."""
    found: dict[str, tuple[dict[str, Lines], str]] = {}
    if any(name in variants for name in METHODS):
        found["methods"] = (
            {told: against_eps(variants, threat) for threat, told in THREATS.items()},
            "eps (pixels from 0 to 1)",
        )
    if any(f"dverge-{members}" in variants for members in (2, 5, 8)):
        middle = sorted(variants["dverge-3"][0]["eps"])[1]
        found["members"] = (
            {
                f"{told}, eps {middle:g}": against_members(variants, threat, middle)
                for threat, told in THREATS.items()
            },
            "members",
        )
    return found


def _line(axes: Any, name: str, line: Sequence[tuple[float, float, float, float]]) -> Any:
    colour, marker = LOOKS[name]
    x, value, low, high = zip(*line, strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    (drawn,) = axes.plot(x, value, color=colour, marker=marker, markersize=4.5, linewidth=1.6)
    return drawn
