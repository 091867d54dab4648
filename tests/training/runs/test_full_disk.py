"""A full disk ends training in one line, and the run goes on once there is room."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from tests.training.refusal import one_line
from tests.training.runs import full_disk
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")


def no_space(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_training_in_one_line_and_leaves_the_run_to_go_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", no_space)
        with pytest.raises(UserError, match=r"no space left .*config\.json") as caught:
            train(tiny_config(), tmp_path / "out", device=CPU)
        one_line(caught)
    real = Path.open

    def no_room_for_metrics(self: Path, *args: Any, **more: Any) -> Any:
        return no_space() if self.name == "metrics.jsonl" else real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_room_for_metrics)
        with pytest.raises(UserError, match=r"no space left .*metrics\.jsonl") as caught:
            train(tiny_config(), tmp_path / "out", device=CPU, resume=True)
        one_line(caught)
    run = train(tiny_config(), tmp_path / "out", device=CPU, resume=True)
    assert run.weights_sha256 == Run(finished).weights_sha256


def test_a_disk_that_is_truly_full_keeps_the_last_good_state(tmp_path: Path) -> None:
    """Without root, on a file system of the test's own: members of stage two find no room."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small disk with")
    script = [
        "unshare",
        "-rm",
        sys.executable,
        "-m",
        "tests.training.runs.full_disk",
        str(tmp_path),
    ]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(script, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode in (1, 77) and not done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    error, left, weights = [json.loads(line) for line in done.stdout.splitlines()]
    assert error["exit_code"] == 2
    found = re.search(
        r"members\.safetensors \(([\d,]+) bytes, ([\d,]+) free: ([\d,]+) missing\)", error["said"]
    )
    assert found is not None, error
    size, free, missing = (int(figure.replace(",", "")) for figure in found.groups())
    assert size - free == missing > 0
    assert "\n" not in error["said"]
    assert left["stage"] == 1  # the state between the stages
    assert "members.safetensors" not in left["files"]
    assert not [name for name in left["files"] if name.startswith(".")]
    whole = train(tiny_config(width=full_disk.WIDTH), tmp_path / "whole", device=CPU)
    assert weights == whole.weights_sha256
