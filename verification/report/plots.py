"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dverge_serve.engine.rates import Accuracies
from dverge_serve.engine.report import Report
from verification.attacks.outcomes import Pixels

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
# Told apart by hue and by lightness, in print too; each line is labelled where it ends.
COLOURS = {"transfer": "#0b6e99", "white_box": "#b3400e", "control": "#7b8794"}
NAMES = {"transfer": "transfer", "white_box": "white-box", "control": "control, transfer"}
OPACITY = 0.75  # of the regions' colours, so that the cross stands out
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $_$
}


def curves(report: Report) -> bytes:
    """Return accuracy against eps with Wilson intervals, the model's and the control's."""
    with mpl.rc_context(STYLE):
        figure = _figure(6.4, 3.6)
        axes = figure.add_subplot()
        lines: dict[str, tuple[Accuracies, str]] = {
            name: (report, name) for name in ("transfer", "white_box")
        }
        if report.control:
            lines["control"] = (report.control, "transfer")
        ends = []
        for name, (found, threat) in lines.items():
            robust = {eps: getattr(row, threat) for eps, row in found.robust_accuracy.items()}
            points = {0.0: found.clean_accuracy} | {e: rate for e, rate in robust.items() if rate}
            if len(points) < 2:
                continue
            x, rates = list(points), points.values()
            colour = COLOURS[name]
            dashes = "--" if name == "control" else "-"
            value = [100 * rate.value for rate in rates]
            axes.plot(x, value, dashes, color=colour, marker="o", markersize=4, linewidth=1.8)
            low, high = [100 * rate.low for rate in rates], [100 * rate.high for rate in rates]
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            ends.append([value[-1], value[-1], x[-1], name])
        _spread(ends, apart=7.0)
        for place, _, x_end, name in ends:
            axes.annotate(
                NAMES[name],
                (x_end, place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS[name],
                annotation_clip=False,
            )
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"eps ({report.norm}, pixels from 0 to 1)")
        axes.set_ylabel("images answered rightly, %")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        return _png(figure)


def query_curves(report: Report) -> bytes | None:
    """Return accuracy against queries with Wilson intervals, a panel for scores and for labels.

    None where nothing was attacked by queries.
    """
    if not report.by_queries:
        return None
    with mpl.rc_context(STYLE):
        kinds = list(dict.fromkeys(row.answers for row in report.by_queries))
        figure = _figure(3.6 * len(kinds) + 0.8, 3.2)
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.8, len(report.robust_accuracy)))
        for at, kind in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), at + 1)
            for number, row in enumerate(
                each for each in report.by_queries if each.answers == kind
            ):
                x = [point.queries for point in row.points]
                colour = tuple(shades[number])
                value = [100 * point.value for point in row.points]
                axes.plot(
                    x, value, color=colour, marker="o", markersize=3, label=f"eps {row.eps:g}"
                )
                low, high = ([100 * getattr(p, end) for p in row.points] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")  # the default is mathematics
            axes.set_ylim(0, 102)
            axes.set_xlabel("queries an image")
            axes.set_title(f"the model tells {kind}", fontsize=9, color=INK)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.legend(loc="lower left", fontsize=8)
            if at == 0:
                axes.set_ylabel("images answered rightly, %")
        return _png(figure)


def heat_maps(members: dict[str, Any]) -> bytes | None:
    """Return the transferability and the diversity matrix, every cell with its number.

    None where neither exists: a single member, no image that all of them get right.
    """
    with mpl.rc_context(STYLE):
        maps = []
        if members.get("transferability", {}).get("images"):
            table = members["transferability"]
            maps.append(
                (
                    f"Attacks on one member fool another\n(share, eps {table['eps']:g})",
                    np.array(table["success"], dtype=float),
                    True,
                )
            )
        nats = members["diversity"]["nats"]
        if len(nats) > 1:
            pairs = np.array([[np.nan if v is None else v for v in row] for row in nats])
            maps.append(("Diversity of two members\n(nats, more is better)", pairs, False))
        if not maps:
            return None
        figure = _figure(3.5 * len(maps), 3.4)
        for at, (title, values, ensemble) in enumerate(maps):
            axes = figure.add_subplot(1, len(maps), at + 1)
            top = 1.0 if ensemble else float(np.nanmax(values)) or 1.0
            axes.imshow(values, cmap="Blues", vmin=0, vmax=top * 1.15)
            for (row, column), value in np.ndenumerate(values):
                told = "" if np.isnan(value) else f"{value:.2f}"
                dark = value > 0.6 * top
                axes.text(
                    column, row, told, ha="center", va="center", color="white" if dark else INK
                )
            names = [str(index + 1) for index in range(len(values))]
            axes.set_xticks(range(values.shape[1]), [*names, "all"] if ensemble else names)
            axes.set_yticks(range(len(values)), names)
            axes.set_xlabel("target" if ensemble else "member")
            axes.set_ylabel("source" if ensemble else "member")
            axes.set_title(title, fontsize=9, color=INK)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return _png(figure)


def regions(
    answers: npt.NDArray[np.int64], reach: float, labels: Sequence[str], truth: Sequence[int]
) -> bytes:
    """Return decision regions around images, as in the paper's figure 1.

    Args:
        answers: class indices `[images, members + 1, points, points]`, the ensemble last; the
            first axis of the plane runs along the gradient, the second along a random direction.
        reach: how far the plane goes from its image, in eps.
        labels: class names.
        truth: the images' classes.
    """
    with mpl.rc_context(STYLE):
        rows, columns = answers.shape[:2]
        shown, places = np.unique(answers, return_inverse=True)
        places = places.reshape(answers.shape)
        lines = -(-len(shown) // columns)
        figure = _figure(1.65 * columns, 1.75 * rows + 0.3 + 0.18 * lines)
        tab = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
        colours = [tab[(2 * at) % 20 + (2 * at >= 20)] for at in range(len(shown))]
        extent = (-reach, reach, -reach, reach)
        for row in range(rows):
            for column in range(columns):
                axes = figure.add_subplot(rows, columns, row * columns + column + 1)
                axes.imshow(
                    places[row, column],
                    cmap=ListedColormap(colours),
                    vmin=-0.5,
                    vmax=len(shown) - 0.5,
                    origin="lower",
                    extent=extent,
                    interpolation="nearest",
                    alpha=OPACITY,
                )
                axes.plot(0, 0, marker="+", color="black", markersize=8)
                axes.set_xticks([-reach, 0, reach])
                axes.set_yticks([-reach, 0, reach] if column == 0 else [])
                axes.tick_params(labelsize=6, length=2)
                if row == 0:
                    name = "ensemble" if column == columns - 1 else f"member {column + 1}"
                    axes.set_title(name, fontsize=8)
                if column == 0:
                    axes.set_ylabel(f"'{labels[truth[row]]}'\nrandom", fontsize=7)
                if row == rows - 1:
                    axes.set_xlabel("along the gradient", fontsize=7)
        named = [
            Patch(color=colour, alpha=OPACITY, label=f"'{labels[answer]}'")
            for colour, answer in zip(colours, shown, strict=True)
        ]
        figure.legend(handles=named, loc="outside lower center", ncols=columns, fontsize=7)
        return _png(figure)


def pictures(
    clean: Pixels, adversarial: Pixels, told: Sequence[tuple[str, str]], eps: float
) -> bytes:
    """Return images, their adversarial versions and the difference, one column an image.

    Args:
        clean, adversarial: uint8 `[n, C, H, W]`.
        told: the model's answers to each, before and after.
        eps: radius; the difference is stretched so that eps is black or white.
    """
    with mpl.rc_context(STYLE):
        count = len(clean)
        figure = _figure(1.2 * count + 0.6, 4.1)
        change = (adversarial.astype(float) - clean) / (255 * eps) / 2 + 0.5
        for row, (name, stack) in enumerate(
            (("clean", clean / 255), ("attacked", adversarial / 255), ("difference", change))
        ):
            for at in range(count):
                axes = figure.add_subplot(3, count, row * count + at + 1)
                shown = np.clip(stack[at].transpose(1, 2, 0), 0, 1)
                gray = shown.shape[2] == 1
                axes.imshow(shown[..., 0] if gray else shown, cmap="gray", vmin=0, vmax=1)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(True)
                axes.spines[:].set_color(GRID)
                if at == 0:
                    axes.set_ylabel(name, fontsize=8)
                if row < 2:
                    axes.set_title(f"'{told[at][row]}'", fontsize=8, pad=3)
        return _png(figure)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _spread(ends: list[list[Any]], apart: float) -> None:
    """Move labels at the lines' ends up until none covers another."""
    ends.sort(key=lambda end: end[0])
    for below, above in pairwise(ends):
        above[0] = max(above[0], below[0] + apart)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
