"""A training that ends early, as a kill would end it, but in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.networks import tiny_config
from training.config import Config
from training.device import pick_device
from training.runs.directory import Run
from training.trainer import train


class StoppedError(Exception):
    """In place of a kill."""


def stopped_at_its_first_state(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train into `out` until a state is saved there, and no further."""
    save_state = Run.save_state

    def stop(self: Run, *args: Any) -> None:
        save_state(self, *args)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", stop)
        with pytest.raises(StoppedError):
            train(config, out, device=pick_device("cpu"))


def stopped_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run that ended between the stages."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            train(tiny_config(), out, device=pick_device("cpu"))
    return Run(out)
