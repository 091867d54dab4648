"""TensorBoard events: the figures of `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from dverge_serve.errors import UserError
from dverge_serve.files import write_error
from training.runs.directory import Run

Log = Callable[[dict[str, Any]], None]  # a line of metrics.jsonl
PATTERN = "events.out.tfevents.*"


@contextlib.contextmanager
def logged(run: Run, *, events: bool) -> Iterator[Log]:
    """Yield a function that logs a line to `metrics.jsonl`, and with `events` to TensorBoard.

    Every scalar's tag begins with its stage and its step is the epoch: `dverge/loss/member_0`,
    `dverge/diversity/0-1`. The event file is written anew from `metrics.jsonl` when a run goes on,
    so that no epoch is in it twice.

    Raises:
        UserError: TensorBoard is not installed, or the folder cannot be written.
    """
    if not (events and run.writes):
        yield run.log
        return
    summary_writer = require_tensorboard()
    try:
        for old in run.path.glob(PATTERN):
            old.unlink()
        writer = summary_writer(str(run.path))
    except OSError as error:
        raise write_error(run.path, error) from error

    def write(record: dict[str, Any]) -> None:
        for tag, value in scalars(record):
            writer.add_scalar(f"{record['stage']}/{tag}", value, record["epoch"])
        writer.flush()

    def log(record: dict[str, Any]) -> None:
        run.log(record)
        write(record)

    with writer:
        metrics = run.path / "metrics.jsonl"
        for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
            write(json.loads(line))
        yield log


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


def require_tensorboard() -> Any:
    """Return TensorBoard's `SummaryWriter`.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard = true, but TensorBoard is not installed",
            "the extra 'tensorboard'",
            "pip install 'dverge-serve[train,tensorboard]'",
        ) from error
    return SummaryWriter
