"""Tables on the terminal: aligned, readable without colour, from 60 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(table: Table) -> None:
    """Print a table to standard output; colours only on a terminal, none under NO_COLOR."""
    Console().print(table)


def plain(value: Any) -> Text:
    """Return text that is never read as markup: class and file names are anybody's."""
    return Text("".join(c if c.isprintable() else "?" for c in str(value)))


def percent(figure: dict[str, Any] | None) -> str:
    """Return a rate as "95.3%", or a dash where it was not measured."""
    return "-" if figure is None else f"{100 * figure['value']:.1f}%"


def interval(figure: dict[str, Any] | None) -> str:
    """Return a rate with its interval, "95.3% (92.6-97.1)"."""
    if figure is None:
        return "not run"
    return f"{percent(figure)} ({100 * figure['low']:.1f}-{100 * figure['high']:.1f})"


def report_table(report: dict[str, Any]) -> None:
    """Print a report's figures and gates."""
    n = report["data"]["n"]
    figures = Table(title=f"Robust accuracy of {n} test images (Wilson 95% interval)")
    for name in ("eps", "transfer", "white-box", "control, transfer"):
        figures.add_column(name, justify="right")
    control = report["control"]
    held = control["robust_accuracy"] if control else [None] * len(report["robust_accuracy"])
    figures.add_row(
        "clean",
        interval(report["clean_accuracy"]),
        "",
        percent(control["clean_accuracy"]) if control else "-",
    )
    for row, other in zip(report["robust_accuracy"], held, strict=True):
        figures.add_row(
            f"{row['eps']:g}",
            interval(row["transfer"]),
            interval(row["white_box"]),
            percent(other["transfer"]) if other else "-",
        )
    show(figures)
    gates = Table(title="Gates")
    gates.add_column("gate", no_wrap=True)
    gates.add_column("result", no_wrap=True)
    gates.add_column("found")
    words = {True: "passed", False: "FAILED", None: "NOT RUN"}
    for gate in report["gates"]:
        gates.add_row(gate["name"], words[gate["passed"]], plain(gate["detail"]))
    show(gates)


def live_line(live: dict[str, Any]) -> str:
    """Return what the attack on a running service found, as one line."""
    square = live["square"]
    same = "" if live["same_model"] else ", which serves ANOTHER model"
    return (
        f"live service{same}: {percent(live['clean_accuracy'])} clean, "
        f"{percent(live['transfer'])} transferred at eps {live['eps']:g}; Square broke "
        f"{square['broken']} of {square['images']} images in {square['queries']} queries; "
        f"{live['requests']} requests; it exposes {live['exposure']}: {', '.join(live['exposed'])}"
    )


def demo_table(report: dict[str, Any], eps: float) -> None:
    """Print the DVERGE ensemble beside the standard one under the same attacks."""
    members = report["model"]["members"]
    table = Table(
        title=f"{report['data']['n']} digit images the ensembles never saw, {members} members each"
    )
    for name in ("", "clean", f"transfer attacks, eps {eps:g}", f"white-box, eps {eps:g}"):
        table.add_column(name, justify="right" if name else "left")
    for name, figures in (("standard", report["control"]), ("DVERGE", report)):
        row = next(row for row in figures["robust_accuracy"] if row["eps"] == eps)
        table.add_row(
            name,
            percent(figures["clean_accuracy"]),
            percent(row["transfer"]),
            percent(row["white_box"]),
        )
    show(table)


def card_table(facts: dict[str, Any]) -> None:
    """Print what a model file is, one fact a line."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, plain(value))
    show(table)


def bench_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print one line for each batch size."""
    table = Table(title=title)
    for name in ("batch", "p50 ms", "p99 ms", "images/s", "bare session ms", "engine's share"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['images_per_s']:.0f}",
            f"{row['bare_ms']:.2f}",
            f"{100 * row['share']:.1f}%",
        )
    show(table)


def predictions_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each classified image."""
    table = Table()
    for name in ("image", "label", "probability", "agreement"):
        left = name in ("image", "label")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        if "error" in row:
            table.add_row(plain(row["image"]), plain(row["error"]), "", "")
        else:
            table.add_row(
                plain(row["image"]),
                plain(row["label"]),
                f"{row['probability']:.3f}",
                f"{row['agreement']:.2f}",
            )
    show(table)
