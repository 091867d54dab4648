"""The kept reports of the benchmarks, and their tables in the documentation.

python -m benchmarks.report

puts every file of `benchmarks/results/` into the page of `docs/` that has a place for it: the lines
between `<!-- figures: NAME -->` and `<!-- end of figures -->`. Others stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import say, show
from dverge_serve.files import pretty_json, write_atomic

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
LOOK_S = 3.0


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    Args:
        doc: the benchmark's own documentation.
        quick: what `--quick` does.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else "")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", action="store_true", help="end with one JSON object")
    made.add_argument("--save", action="store_true", help="keep the report in benchmarks/results/")
    return made


def turns(doc: str | None, seconds: int, tools: Mapping[str, str]) -> argparse.Namespace:
    """Return the options, read from the command line, of a benchmark whose cases take turns.

    Args:
        doc: the benchmark's own documentation.
        seconds: length of each measurement, if nobody says it.
        tools: programs that it needs, each with its Debian package.

    Raises:
        SystemExit: one of these is not installed.
    """
    arguments = parser(doc, "one round of one second each")
    arguments.add_argument(
        "--seconds", type=int, default=seconds, help="length of each measurement"
    )
    arguments.add_argument("--rounds", type=int, default=3, help="turns that each case gets")
    options = arguments.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    for tool, package in tools.items():
        if not shutil.which(tool):
            raise SystemExit(f"{tool} is not installed; on Debian: apt-get install {package}")
    return options


def busy_percent() -> float:
    """Return how much of all cores others use just now, percent."""
    return float(psutil.cpu_percent(LOOK_S))


def finish(
    name: str,
    report: dict[str, Any],
    columns: list[str],
    options: argparse.Namespace,
    module: str = "",
) -> None:
    """Print the report, and keep it where that was asked for.

    Args:
        name: the benchmark's.
        report: machine, rows, bars and what was skipped.
        columns: of the rows, in the order that they are shown in.
        options: from `parser`.
        module: which made it, where that has another name.
    """
    if options.save and not options.quick:
        command = shlex.join(
            [
                "python",
                "-m",
                f"benchmarks.{module or name}",
                *(a for a in sys.argv[1:] if a != "--save"),
            ]
        )
        facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "columns": columns}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        write_atomic(path, pretty_json(facts | report))
        say(f"kept in {path.relative_to(RESULTS.parents[1])}")
    elif options.save:
        say("not kept: --quick measures too little")
    show(report, columns, as_json=options.json)


def markdown(kept: dict[str, Any]) -> str:
    """Return a kept report as a documentation page shows it."""
    here = kept["machine"]
    versions = ("gpu", "cuda", "torch", "python", "onnxruntime")
    told = ", ".join(f"{name} {here[name]}" for name in versions if name in here)
    busy = f", {here['busy_percent']:.0f}% busy before" if "busy_percent" in here else ""
    lines = [
        f"`{kept['command']}`, {kept['date']}: {here['cpu']}, {here['cores']} cores{busy}, {told}.",
        "",
        "| " + " | ".join(column.replace("_", " ") for column in kept["columns"]) + " |",
        "|" + "---|" * len(kept["columns"]),
    ]
    for row in kept["rows"]:
        cells = [_cell(row.get(column)) for column in kept["columns"]]
        lines.append("| " + " | ".join(cells) + " |")
    if kept["bars"] or kept["skipped"]:
        lines += ["", "| bar | measured | asked for | holds |", "|---|---|---|---|"]
    for bar in kept["bars"]:
        measured, limit = (f"{_cell(bar[key])} {bar['unit']}" for key in ("value", "bar"))
        lines.append(
            f"| {bar['name']} | {measured} | {limit} | {'yes' if bar['holds'] else 'no'} |"
        )
    lines += [f"| {each['name']} | not measured: {each['why']} | | |" for each in kept["skipped"]]
    return "\n".join(lines) + "\n"


def write_docs(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Put the tables of all kept reports into the pages; return those that changed."""

    def table(match: re.Match[str]) -> str:
        file = results / f"{match[2]}.json"
        if not file.exists():
            return match[0]
        return match[1] + markdown(json.loads(file.read_bytes())) + match[3]

    changed = []
    for page in sorted(docs.rglob("*.md")):
        before = page.read_text()
        after = PLACE.sub(table, before)
        if after != before:
            write_atomic(page, after.encode())
            changed.append(page)
    return changed


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


if __name__ == "__main__":
    for page in write_docs():
        say(f"wrote {page.relative_to(DOCS.parent)}")
