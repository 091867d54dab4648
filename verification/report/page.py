"""The report as one self-contained HTML page: the verdict first."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dverge_serve.engine.rates import ByQueries
from dverge_serve.engine.report import Report
from verification.contract import Contract

PLOTS = ("curves", "queries", "matrices", "regions", "pictures")
BUDGETS = (100, 1000, 5000)  # queries an image: the columns of their table, as far as asked
SAID_ELSEWHERE = ("name", "gate", "control", "norm")  # of an attack's parameters


def page(report: Report, plots: Mapping[str, bytes]) -> bytes:
    """Return the report as UTF-8 HTML that fetches nothing and runs nothing.

    Args:
        report: the report.
        plots: PNG bytes by name (of `PLOTS`), those there are.
    """
    table = report.to_json()
    templates = _templates()
    templates.filters["radius"] = report.radius
    asked = [q for q in BUDGETS if any(row.points[-1].queries >= q for row in report.by_queries)]
    css = resources.files("verification.report").joinpath("templates/page.css").read_text("utf-8")
    return (
        templates.get_template("page.html.j2")
        .render(
            report=table,
            gates=report.gates,
            plots={name: base64.b64encode(plots.get(name, b"")).decode() for name in PLOTS},
            css=Markup(css),  # noqa: S704 - our own file; its hash in the policy needs the very bytes
            digest=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
            radii=[f"eps {report.radius(eps)}" for eps in report.robust_accuracy],
            alone=_alone(table),
            budgets=[f"{each:,} queries" for each in asked],
            by_queries=[_by_queries(row, asked) for row in report.by_queries],
            pairs=_pairs(table),
            parameters=_parameters(table["attacks"]),
            contract=str(Contract.from_json(table["model"].get("contract", {}))),
        )
        .encode()
    )


def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("verification.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {
        "g": "{:g}".format,
        "hyphens": lambda name: name.replace("_", "-"),
        "interval": _interval,
        "percent": _percent,
    }
    found.filters["words"] = _words
    return found


def _words(text: str) -> Markup:
    """Return advice as HTML, what is in backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def _percent(rate: dict[str, Any] | None) -> str:
    """Return a rate in percent, `-` where it was not measured."""
    return "-" if not rate or rate["value"] is None else f"{100 * rate['value']:.1f}%"


def _interval(rate: dict[str, Any] | None, places: int = 1, times: int = 100) -> str:
    """Return a rate with its interval, `value (low-high)`, in hundredths unless told otherwise."""
    if not rate:
        return "not run"
    if rate["value"] is None:
        return "-"
    value, low, high = (f"{times * rate[key]:.{places}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def _by_queries(row: ByQueries, asked: list[int]) -> list[str]:
    """Return the cells of a line of the table of queries; `-` beyond what was asked."""
    rates = {point.queries: point.interval for point in row.points}
    median = "-" if row.median is None else f"{row.median:g} queries"
    return [f"{row.eps:g}", row.answers, *(rates.get(each, "-") for each in asked), median]


def _alone(report: dict[str, Any]) -> dict[str, list[str]]:
    """Return for each attack, at each radius, the images that survive it alone.

    In percent of all; of an attack that was run on some images only, how many of those.
    """
    lines: dict[tuple[str, float], list[str]] = {}
    for each in report["outcomes"]["model"]["survived"]:
        lines.setdefault((each["attack"], each["eps"]), []).append(each["images"])

    def cell(attack: str, row: dict[str, Any]) -> str:
        found = (row["all"] or {}).get("attacks", {}).get(attack)
        images = list(zip(*lines.get((attack, row["eps"]), []), strict=True))
        ran = [image for image in images if image[0] != "-"]
        if found is None or not ran:
            return "-"
        if len(ran) == len(images):
            return f"{100 * found:.1f}"
        return f"{sum(set(image) == {'1'} for image in ran)} of {len(ran)}"

    return {
        attack["name"]: [cell(attack["name"], row) for row in report["robust_accuracy"]]
        for attack in report["attacks"]
    }


def _pairs(report: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the surrogates, and for each transfer attack what survives it from each of them.

    In percent at the largest radius; empty for pairs that were not run on all images.
    """
    names = [each["name"] for each in report["surrogates"]]
    last = max(report["robust_accuracy"], key=lambda row: row["eps"])
    alone = (last["transfer"] or {}).get("attacks", {})
    found: dict[str, dict[str, str]] = {}
    for attack in report["attacks"]:
        kind, _, source = attack["name"].partition(" from ")
        if source in names and attack["name"] in alone and not attack["standing_only"]:
            found.setdefault(kind, {})[source] = f"{100 * alone[attack['name']]:.1f}"
    return names, {kind: [cells.get(name, "") for name in names] for kind, cells in found.items()}


def _parameters(attacks: list[dict[str, Any]]) -> list[str]:
    """Return the names of the parameters in which the attacks differ."""
    return [
        key
        for key in attacks[0]
        if key not in SAID_ELSEWHERE and len({str(attack[key]) for attack in attacks}) > 1
    ]
