"""Trains in child processes that a test holds at a chosen call, and kills.

Started once, so that torch is imported once. Each line on standard input is a task:
`{"out", "settings", "resume", "hold": [function, when, call] or null}`. The child holds `before` or
`after` the given call of the function and says so; every answer is a line of JSON.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # SGD's first step reaches for it, which takes seconds; here it is paid once

import training.trainer
from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.data.splits import TrainingData, load_training
from training.runs.directory import Run

HOLDS: dict[str, tuple[type, str]] = {
    "log": (Run, "log"),
    "save_state": (Run, "save_state"),
    "save_members": (Run, "save_members"),
    "finish": (Run, "finish"),
    "rename": (Path, "replace"),
    "unlink": (Path, "unlink"),
}


def say(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def hold(name: str, when: str, call: int) -> None:
    owner, attribute = HOLDS[name]
    plain: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    @functools.wraps(plain)
    def held(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            wait()
        result = plain(*args, **kwargs)
        if calls == call and when == "after":
            wait()
        return result

    setattr(owner, attribute, held)


def wait() -> None:
    say(event="held")
    signal.pause()


def child(task: dict[str, Any], data: TrainingData) -> int:
    training.trainer.SAVE_EVERY_S = 0.0  # after every epoch
    if task["hold"]:
        hold(*task["hold"])
    try:
        training.trainer.train(
            tiny_config(**task["settings"]),
            Path(task["out"]),
            device=torch.device("cpu"),
            resume=task["resume"],
            data=data,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    torch.set_num_threads(1)
    data: TrainingData | None = None
    for line in sys.stdin:
        task = json.loads(line)
        data = data or load_training(tiny_config(**task["settings"]).data)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = child(task, data)
            finally:
                sys.stderr.flush()
                os._exit(code)
        say(event="started", pid=pid)
        _, status = os.waitpid(pid, 0)
        say(event="ended", code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
