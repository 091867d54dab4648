"""Run the cells that are not there yet, then write the page: `python -m benchmarks.evidence`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.bench import say
from benchmarks.evidence import cells, record
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.limit import TimeUp, within
from benchmarks.evidence.page import write_page
from dverge_serve.errors import UserError
from dverge_serve.files import pretty_json, write_atomic
from dverge_serve.progress import duration, show

GUESS_S = 120.0  # a cell's seconds before the first one was timed


def run_cells(wanted: list[Cell], folder: Path, minutes: float | None = None) -> dict[str, str]:
    """Run the cells in order, each leaving its record; return why some could not be.

    A cell under way when the minutes are used up loses seconds: its trainings go on from their last
    saved state, its attacks from those in the cache.

    Args:
        wanted: those already there as they are now defined are not run again.
        folder: of the records.
        minutes: after which to stop; None for no limit.
    """
    left = [cell for cell in wanted if not record.current(cell, folder)]
    say(f"{len(wanted) - len(left)} of {len(wanted)} cells are there")
    skipped: dict[str, str] = {}
    try:
        with within(minutes):
            _run_all(left, folder, skipped)
    except TimeUp:
        missing = sum(not record.current(cell, folder) for cell in left) - len(skipped)
        say(f"the time is used up, cells left: {missing}; the same command goes on")
    return skipped


def _run_all(left: list[Cell], folder: Path, skipped: dict[str, str]) -> None:
    """Run every cell of `left`; note in `skipped` why some could not be."""
    import torch

    from benchmarks.evidence.measure import measure

    spent, units = 0.0, 0
    for position, cell in enumerate(left):
        each = spent / units if units else GUESS_S / cell.members
        rest = each * sum(other.members for other in left[position:])
        told = f"{position + 1} of {len(left)}"
        say(f"cell {told}, {cell.slug}: about {duration(rest)} left in all")
        begun = time.monotonic()
        try:
            found = measure(cell, torch.device("cpu"))
        except UserError as error:
            skipped[cell.slug] = str(error)
            say(f"cell {told}, {cell.slug}: skipped, {error}")
            continue
        write_atomic(record.path_of(cell, folder), pretty_json(found))
        spent, units = spent + time.monotonic() - begun, units + cell.members
        figures = found["figures"]
        say(f"cell {told}, {cell.slug}: clean {figures['clean']:.3f}, {figures['transfer']}")


def main() -> None:
    """Run from the command line."""
    show()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells with this in their name")
    parser.add_argument("--list", action="store_true", help="say which cells are there, and stop")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--results", type=Path, default=record.FOLDER, help="the folder of records")
    parser.add_argument("--minutes", type=float, help="stop when so many have passed")
    parser.add_argument(
        "--work", type=Path, help="where unfinished runs are kept, to go on; by default the cache"
    )
    options = parser.parse_args()
    if options.work:
        os.environ["DVERGE_CACHE"] = str(options.work.resolve())
    wanted = [cell for cell in cells.every() if options.only in cell.slug]
    if options.list:
        for cell in wanted:
            print("there  " if record.current(cell, options.results) else "missing", cell.slug)
        return
    skipped = {} if options.page else run_cells(wanted, options.results, options.minutes)
    if options.results == record.FOLDER:
        for path in write_page():
            say(f"wrote {path}")
    for name, why in skipped.items():
        say(f"skipped {name}: {why}")


if __name__ == "__main__":
    main()
