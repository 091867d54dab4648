"""The figures of the long tests: told when they ran, and kept for the documentation."""

from __future__ import annotations

import json
import os
import time

from benchmarks.bench import machine
from benchmarks.report import RESULTS
from dverge_serve.files import pretty_json, write_atomic

COLUMNS = ["run", "figures", "command"]


def tell(run: str, figures: str, part: str) -> None:
    """Print what a run came to; with `KEEP_FIGURES=1` also keep it in `benchmarks/results/`.

    Args:
        run: what was done; a later run of that name takes its place.
        figures: in words.
        part: what `make long PART=...` calls it.
    """
    print(f"\n{run}: {figures}")
    if os.environ.get("KEEP_FIGURES") != "1":
        return
    path = RESULTS / "long.json"
    rows = json.loads(path.read_bytes())["rows"] if path.exists() else []
    command = f"make long PART={part}"
    rows = [row for row in rows if row["run"] != run]
    rows.append({"run": run, "figures": figures, "command": f"`{command}`"})
    facts = {"command": "make long", "date": time.strftime("%Y-%m-%d"), "columns": COLUMNS}
    RESULTS.mkdir(exist_ok=True)
    report = {"machine": machine(), "rows": rows, "bars": [], "skipped": []}
    write_atomic(path, pretty_json(facts | report))
