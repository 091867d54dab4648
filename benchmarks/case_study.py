"""Figures of a case study: what verification reports say, side by side.

python -m benchmarks.case_study NAME REPORT.json [REPORT.json ...] [--save]

A row for each model and radius, of the reports that `dverge verify-robustness` wrote; `--save`
keeps them as `benchmarks/results/NAME.json`, for the page of docs/ with a place of that name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.bench import machine
from benchmarks.report import finish, parser
from dverge_serve.engine.radius import written

COLUMNS = ["model", "images", "clean", "clean_of_more"]
COLUMNS += ["eps", "transfer", "control", "white_box", "verdict"]
SUFFIX = ".report.json"


def rows(model: str, report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a report says of its model at each radius.

    Args:
        model: its name, for people.
        report: as its JSON file has it.
    """
    alone = (report["control"] or {}).get("robust_accuracy", [])
    more = report.get("more_clean_images")
    first = {
        "images": report["clean_accuracy"]["n"],
        "clean": _share(report["clean_accuracy"]),
        "clean_of_more": f"{_share(more['model'])} of {more['model']['n']:,}" if more else None,
    }
    for at, control in zip_longest(report["robust_accuracy"], alone):
        yield {
            "model": model,
            **first,
            "eps": written(at["eps"]),
            "transfer": _share(at["transfer"]),
            "control": _share(control and control["transfer"]),
            "white_box": _share(at["white_box"]),
            "verdict": report["verdict"],
        }


def _share(rate: Mapping[str, Any] | None) -> str | None:
    return f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})" if rate else None


def main() -> None:
    """Run it."""
    options = parser(__doc__, "nothing, here")
    options.add_argument("name", help="of the figures")
    options.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    chosen = options.parse_args()
    found: list[dict[str, Any]] = []
    made_on: dict[str, Any] = {}
    for path in chosen.reports:
        report = json.loads(path.read_bytes())
        made_on = machine() | {key: report["run"][key] for key in ("cores", "python", "torch")}
        found += rows(path.name.removesuffix(SUFFIX), report)
    kept = {"machine": made_on, "rows": found, "bars": [], "skipped": []}
    finish(chosen.name, kept, COLUMNS, chosen, module="case_study")


if __name__ == "__main__":
    main()
