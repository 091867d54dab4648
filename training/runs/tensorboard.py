"""TensorBoard events: the figures of `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError
from dverge_serve.files import write_error
from training.runs.directory import Run

Log = Callable[[dict[str, Any]], None]  # a line of metrics.jsonl
PATTERN = "events.out.tfevents.*"


class Events:
    """The event file of a run.

    Every scalar's tag begins with its stage and its step is the epoch: `dverge/loss/member_0`,
    `dverge/diversity/0-1`. The file is written anew from `metrics.jsonl` when a run goes on, so
    that no epoch is in it twice.

    Args:
        folder: the run directory, in which `metrics.jsonl` is as the run goes on from it.

    Raises:
        UserError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        writer = _writer()
        try:
            for old in folder.glob(PATTERN):
                old.unlink()
            self._writer = writer(str(folder))
        except OSError as error:
            raise write_error(folder, error) from error
        metrics = folder / "metrics.jsonl"
        if metrics.is_file():
            for line in metrics.read_bytes().splitlines():
                self._add(json.loads(line))
        self._writer.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Write one line of `metrics.jsonl` as events."""
        self._add(record)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()

    def _add(self, record: dict[str, Any]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(f"{record['stage']}/{tag}", value, record["epoch"])


@contextlib.contextmanager
def logged(run: Run, *, events: bool) -> Iterator[Log]:
    """Yield a function that logs a line to `metrics.jsonl`, and with `events` to TensorBoard."""
    if not (events and run.writes):
        yield run.log
        return
    written = Events(run.path)

    def log(record: dict[str, Any]) -> None:
        run.log(record)
        written.add(record)

    try:
        yield log
    finally:
        written.close()


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield tag and value of each figure in a line of `metrics.jsonl`."""
    for index, loss in enumerate(record["losses"]):
        yield f"loss/member_{index}", loss
    for name in ("holdout_accuracy", "lr", "images_per_s"):
        if name in record:
            yield name, record[name]
    for i, row in enumerate(record.get("diversity", [])):
        for j, value in enumerate(row[i + 1 :], start=i + 1):
            yield f"diversity/{i}-{j}", value


def require_tensorboard() -> None:
    """Raise a UserError where TensorBoard is not installed."""
    _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard = true, but TensorBoard is not installed",
            "the extra 'tensorboard'",
            "pip install 'dverge-serve[train,tensorboard]'",
        ) from error
    return SummaryWriter
