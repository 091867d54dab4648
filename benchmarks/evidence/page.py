"""`docs/results.md` and its plots, made from the records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.evidence import cells, claims, record, tables, verified
from benchmarks.evidence.drawing import panels, plot
from benchmarks.evidence.paired import RESAMPLES
from benchmarks.evidence.record import Record
from benchmarks.evidence.tables import COSTS, METHODS
from benchmarks.report import markdown
from dverge_serve.files import write_atomic

DOCS = Path(__file__).parents[2] / "docs"
TEMPLATE = Path(__file__).with_name("results.template.md")
FIGURES = record.FOLDER.parent
SEARCH = FIGURES / "fast-digits.json"
TRANSFER = FIGURES / "transfer-digits.json"
RATES = FIGURES / "partners-digits.json"
SIGNS = FIGURES / "traffic_signs.json"
EXACT = "dverge-3-exact"
FAST = ("dverge-3-fast-a", "dverge-3-fast-b", "dverge-3-fast-c")
SIZES = {
    f"{method}-{size}": f"{told}, {size} members"
    for method, told in (("dverge", "DVERGE"), ("standard", "standard"))
    for size in (2, 3, 5, 8)
}
GROWN = {
    told: (f"{method}-8", f"{method}-2")
    for method, told in (("dverge", "DVERGE"), ("standard", "standard"))
}
RULED = {"dverge-3": "DVERGE", "standard-3": "standard", "dverge-8": "DVERGE, 8 members"}
ALARMED = {**METHODS, "dverge-8": "DVERGE, 8 members"}
AGAINST = {told: ("dverge-3", name) for name, told in METHODS.items() if name != "dverge-3"}
VARIANTS = {
    told: (name, EXACT)
    for name, told in COSTS.items()
    if name.startswith("dverge-3") and name != EXACT
}
PARTNERED = {
    f"{name}-{size}": f"{told}, {size} members"
    for size in (3, 5, 8, 16)
    for name, told in {"all": "all others", **claims.ONE}.items()
}
ONE_FOR_ALL = {
    f"{told}, {size} members": (f"{name}-{size}", f"all-{size}")
    for size in (3, 5, 8)
    for name, told in claims.ONE.items()
}
# Verified models for CIFAR-10, all under the same attacks.
CIFAR10 = {
    "cifar10-36-epochs": "**DVERGE, 36 epochs**",
    "published-dverge": "published DVERGE checkpoint",
}
# The same, attacked from networks that are not among the first one's source models.
WITH_SOURCES = {
    "held-out-dverge-and-transfer": "**DVERGE + transfer**",
    "held-out-cifar10-start": "DVERGE, `cifar10-start`",
    "held-out-published-dverge": CIFAR10["published-dverge"],
}


def write_page(docs: Path = DOCS, folder: Path = record.FOLDER) -> list[Path]:
    """Write the page and its plots, and return where they are."""
    records = record.read(folder)
    written = [docs / "results.md"]
    write_atomic(written[0], page(records).encode())
    for name, (drawn, across) in panels(tables.by_name(records, "digits")).items():
        written.append(docs / "results" / f"{name}.svg")
        write_atomic(written[-1], plot(drawn, across))
    return written


def page(records: Sequence[Record]) -> str:
    """Return the page."""
    digits = tables.by_name(records, "digits")
    partners = tables.by_name(records, "digits-fast")
    plots = panels(digits)
    fast = claims.fast_is_not_inferior(digits, EXACT, FAST)
    return Template(TEMPLATE.read_text()).substitute(
        progress=_progress(records),
        resamples=f"{RESAMPLES:,}",
        methods_claim=claims.more_robust_than_earlier_methods(digits),
        adversarial=claims.beside_adversarial_training(digits),
        methods=tables.accuracies(digits, METHODS),
        methods_plot=_plot("methods", "Accuracy against eps") if "methods" in plots else "",
        methods_differences=tables.differences(digits, AGAINST, "against"),
        transfer_claims=_items(claims.learns_from_other_networks(digits)),
        transfer_searched=tables.searched(_kept(TRANSFER)),
        sizes_claim=claims.grows_with_members(digits),
        sizes=tables.accuracies(digits, SIZES),
        sizes_differences=tables.differences(digits, GROWN, "ensemble"),
        sizes_plot=_plot("members", "Accuracy against members") if "members" in plots else "",
        rules_claim=claims.rules_are_alike(digits),
        rules=tables.combination_rules(digits, RULED),
        alarm=tables.alarm(digits, ALARMED),
        partners_claims=_items(claims.one_partner_is_enough(partners, ONE_FOR_ALL.values())),
        partners=tables.accuracies(partners, PARTNERED),
        partners_differences=tables.differences(partners, ONE_FOR_ALL, "less all others"),
        partners_costs=tables.costs(partners, PARTNERED, "all-3"),
        partners_searched=tables.searched(_kept(RATES)),
        costs=tables.costs(digits, COSTS, EXACT),
        costs_differences=tables.differences(digits, VARIANTS, "variant"),
        fast_claims=_items(fast),
        searched=tables.searched(_kept(SEARCH)),
        cifar10=_side_by_side(CIFAR10),
        cifar10_with_sources=_side_by_side(WITH_SOURCES),
        signs=markdown(_kept(SIGNS)),
        hardware=_hardware(records),
    )


def _side_by_side(names: Mapping[str, str]) -> str:
    """Return the tables of verified models: each one's, and the first less each of the others."""
    variants = {name: [verified.read(name)] for name in names}
    first, *others = names
    return (
        f"{tables.accuracies(variants, names)}\nThe first less the others, in points:\n\n"
        + tables.differences(variants, {names[each]: (first, each) for each in others}, "against")
        + "\n"
        + _items([verified.describe(told, *variants[name]) for name, told in names.items()])
    )


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _kept(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _progress(records: Sequence[Record]) -> str:
    made = {_slug(each): each for each in records}
    wanted = {cell.slug: cell for cell in cells.every()}
    missing = [slug for slug in wanted if slug not in made]
    older = [
        slug
        for slug, cell in wanted.items()
        if slug in made and not record.matches(cell, made[slug])
    ]
    told = f"{len(wanted) - len(missing)} of {len(wanted)} cells have been run."
    if missing:
        told += f" Still missing: {_named(missing)}."
    if older:
        told += f" Run with other settings than today's: {_named(older)}."
    return told


def _named(slugs: Sequence[str]) -> str:
    count = Counter(slug.rsplit("-seed", 1)[0] for slug in slugs)
    return ", ".join(f"{name} ({seeds})" for name, seeds in count.items())


def _plot(name: str, told: str) -> str:
    return f"![{told}](results/{name}.svg)\n"


def _hardware(records: Sequence[Record]) -> str:
    machines: dict[str, list[float]] = {}
    for each in records:
        here = each["machine"]
        told = (
            f"{here['cpu']}, {here['cores']} cores, Python {here['python']}, torch "
            f"{here['torch']}, ONNX Runtime {here['onnxruntime']}"
        )
        machines.setdefault(told, []).append(here["load_average_before"])
    lines = [
        f"- {len(loads)} cells: {told}; load average before each {min(loads):g} to {max(loads):g}"
        for told, loads in machines.items()
    ]
    odd = [
        f"- {_slug(each)}: {each['verdict']}, not passed: {', '.join(each['gates_not_passed'])}"
        for each in records
        if each["verdict"] != "VALID"
    ]
    verdicts = "All cells' reports are VALID." if not odd else "Reports that are not VALID:"
    return "\n".join([*lines, "", verdicts, "", *odd]).rstrip()


def _slug(each: Record) -> str:
    return cells.slug(each["recipe"], each["name"], each["seed"])
