"""Tables on the terminal: aligned, readable without colour, from 60 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dverge_serve.engine.radius import written
from dverge_serve.errors import printable
from dverge_serve.progress import gigabytes

HASH = re.compile("[0-9a-f]{64}")

if TYPE_CHECKING:
    from dverge_serve.engine.environment import CacheUse, Finding
    from dverge_serve.engine.live_report import Live
    from dverge_serve.engine.rates import Accuracies, Rate
    from dverge_serve.engine.report import Report


def show(table: Table) -> None:
    """Print a table to standard output; colours only on a terminal, none under NO_COLOR."""
    Console().print(table)


def plain(value: Any) -> Text:
    """Return text that is never read as markup: class and file names are anybody's."""
    return Text(printable(str(value)))


def percent(rate: Rate | None) -> str:
    """Return a rate as "95.3%", or a dash where it was not measured."""
    return "-" if rate is None else rate.percent


def interval(rate: Rate | None) -> str:
    """Return a rate with its interval, "95.3% (92.6-97.1)"."""
    return "not run" if rate is None else rate.interval


def report_table(report: Report) -> None:
    """Print a report's figures and gates."""
    control = report.control
    held = percent(control.clean_accuracy) if control else "-"
    rows = [("clean", interval(report.clean_accuracy), "", held)]
    if more := report.more_clean_images:
        clean = f"clean, of {more.model.n:,}"
        rows.append((clean, interval(more.model), "", percent(more.control)))
    for eps, row in report.robust_accuracy.items():
        held = percent(control.robust_accuracy[eps].transfer) if control else "-"
        rows.append((report.radius(eps), interval(row.transfer), interval(row.white_box), held))
    title = f"Robust accuracy of {report.data.n} test images (Wilson 95% interval)"
    show(_table(title, ("eps", "transfer", "white-box", "control, transfer"), rows))
    if report.by_queries:
        show(_queries_table(report))
    gates = Table(title="Gates")
    gates.add_column("gate", no_wrap=True)
    gates.add_column("result", no_wrap=True)
    gates.add_column("found")
    words = {True: "passed", False: "FAILED", None: "NOT RUN"}
    for gate in report.gates:
        gates.add_row(gate.name, words[gate.passed], plain(gate.detail))
    show(gates)


def _queries_table(report: Report) -> Table:
    """Return accuracy by queries: callers who see scores, or labels alone, or steal the model."""
    kinds = list(dict.fromkeys(row.answers for row in report.by_queries))
    found = {(row.eps, row.answers): row.points[-1] for row in report.by_queries}
    stolen = report.substitute.robust_accuracy if report.substitute else {}
    rows = [
        (
            report.radius(eps),
            *(interval(found.get((eps, kind))) for kind in kinds),
            percent(stolen.get(eps)),
        )
        for eps in report.robust_accuracy
    ]
    last = report.by_queries[-1].points[-1]
    title = f"By callers: {last.queries} queries for each of {last.n} images"
    return _table(title, ("eps", *kinds, "stolen model"), rows)


def verdict_lines(report: Report) -> list[str]:
    """Return the verdict, the gates that did not pass, and what to do about each, a line each."""
    lines = [f"verdict {report.verdict}"]
    for gate in report.gates:
        if not gate.passed:
            word = "could not be run" if gate.passed is None else "failed"
            lines.append(f"{gate.name} {word}: {gate.detail}")
            lines += [f"  what to do: {gate.next_step}"] if gate.next_step else []
    return lines


def live_line(live: Live) -> str:
    """Return what the attack on a running service found, as one line."""
    told = {True: "", False: ", which serves ANOTHER model", None: ", which names no model file"}
    asked, stolen = live.by_queries, live.substitute
    seen = ""
    if asked.flagged_images:
        what = f"refused {asked.refused}" if asked.refused else f"saw {asked.flagged_images}"
        seen = f" (its watch {what} of them, after {asked.flagged_after} queries at the earliest)"
    return (
        f"live service{told[live.same_model]}: {percent(live.clean_accuracy)} clean; "
        f"at eps {written(live.eps)} {percent(live.transfer)} transferred, "
        f"{percent(stolen.robust)} from a substitute trained on its {stolen.answers} "
        f"({stolen.queries} queries); {asked.attack} by {asked.answers} "
        f"broke {asked.broken} of {asked.images} images in {asked.queries} queries{seen}; "
        f"{live.requests} requests; it exposes {live.exposure}: {', '.join(live.exposed)}"
    )


def demo_table(report: Report, standard: Accuracies, eps: float) -> None:
    """Print the DVERGE ensemble beside the standard one under the same attacks."""
    rows = []
    for name, found in (("standard", standard), ("DVERGE", report)):
        row = found.robust_accuracy[eps]
        rates = found.clean_accuracy, row.transfer, row.white_box
        rows.append((name, *map(percent, rates)))
    n, members = report.data.n, report.model.members
    title = f"{n} digit images the ensembles never saw, {members} members each"
    columns = ("", "clean", f"transfer attacks, eps {eps:g}", f"white-box, eps {eps:g}")
    show(_table(title, columns, rows, left=1))


def card_table(facts: dict[str, Any]) -> None:
    """Print what a model file is, one fact a line; last those with a hash, which stays whole."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    hashed = {name: value for name, value in facts.items() if HASH.search(str(value))}
    for name, value in facts.items():
        if name not in hashed:
            table.add_row(name, plain(value))
    show(table)
    for name, value in hashed.items():
        Console().print(plain(f"{name}: {value}"), soft_wrap=True)


def bench_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print one line for each batch size."""
    form = "{batch} {p50_ms:.2f} {p99_ms:.2f} {images_per_s:.0f} {bare_ms:.2f} {share:.1%}"
    columns = ("batch", "p50 ms", "p99 ms", "images/s", "bare session ms", "engine's share")
    show(_table(title, columns, [form.format(**row).split() for row in rows]))


def findings_table(findings: Iterable[Finding]) -> None:
    """Print what the environment has, and what follows from it."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        told = f"{each.found}\n{each.advice}" if each.advice else each.found
        table.add_row(each.what, plain(told))
    show(table)


def cache_table(parts: Sequence[CacheUse], folder: Path) -> None:
    """Print what each part of the cache holds, and all of it."""
    rows = [(each.name, f"{each.entries}", gigabytes(each.size)) for each in parts]
    if rows:
        show(_table(None, ("part", "entries", "size"), rows, left=1))
    Console().print(plain(f"{gigabytes(sum(each.size for each in parts))} in {folder}"))


def predictions_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each classified image."""
    told = [
        (plain(row["image"]), plain(row["error"]))
        if "error" in row
        else (
            plain(row["image"]),
            plain(row["label"]),
            f"{row['probability']:.3f}",
            f"{row['agreement']:.2f}",
        )
        for row in rows
    ]
    show(_table(None, ("image", "label", "probability", "agreement"), told, left=2))


def _table(
    title: str | None, columns: Iterable[str], rows: Iterable[Iterable[str | Text]], left: int = 0
) -> Table:
    """Return a table of figures behind `left` columns of words."""
    table = Table(title=title)
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
