"""`latest`, beside the runs: a link to the newest, or a file where links fail."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.networks import tiny_config
from training.runs.directory import Run
from training.runs.latest import follow
from training.trainer import train

CPU = torch.device("cpu")


def test_latest_names_the_newest_run_from_its_start(finished: Path, tmp_path: Path) -> None:
    latest = finished.parent / "latest"
    assert latest.resolve() == finished.resolve()
    runs = tmp_path / "runs"
    for name in ("first", "second"):
        Run.begin(runs / name, tiny_config(), resume=False)
        assert (runs / "latest").resolve() == (runs / name).resolve()
    Run.begin(runs / "first", tiny_config(), resume=True)
    assert (runs / "latest").resolve() == (runs / "first").resolve()
    Run.begin(tmp_path / "elsewhere" / "third", tiny_config(), resume=False)
    assert not (tmp_path / "elsewhere" / "latest").exists()


def test_latest_is_a_text_file_where_links_fail(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    Run.begin(runs / "one", tiny_config(), resume=True)
    assert not (runs / "latest").is_symlink()
    assert (runs / "latest").read_text() == "one"
    assert Run.open_finished(runs / "latest").weights_sha256 == Run(finished).weights_sha256
    Run.begin(runs / "latest", tiny_config(), resume=True)
    assert (runs / "latest").read_text() == "one"


def test_resuming_latest_by_its_name_keeps_the_link_whole(finished: Path, tmp_path: Path) -> None:
    """`--resume --out runs/latest` once turned the link into one to itself."""
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True))
    run = train(tiny_config(), runs / "latest", device=CPU, resume=True)
    assert run.path == runs / "one" == follow(runs / "latest")
    assert (runs / "latest").readlink() == Path("one")
    assert Run.open_finished(runs / "latest").path == runs / "one"
