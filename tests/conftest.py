"""What the rooms' tests share: one tiny finished run, and a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny tensors: more threads cost more than they give, here and in the processes tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {
    "width": 8,
    "standard.epochs": 4,
    "dverge.epochs": 3,
    "batch_size": 64,
    "data.train_limit": 640,
    "data.test_limit": 64,
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests never see, nor fill, a person's cache."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("DVERGE_CACHE")
    os.environ["DVERGE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["DVERGE_CACHE"]
    else:
        os.environ["DVERGE_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits: resnet8 of width 4, three members, a few epochs."""
    import torch

    from training.recipe import load_recipe
    from training.trainer import train

    out = tmp_path_factory.mktemp("tiny") / "runs" / "tiny"
    return train(load_recipe("digits", TINY), out, device=torch.device("cpu")).path


@pytest.fixture(scope="session")
def tiny_model(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run as `model.onnx`."""
    from export.exporter import export
    from training.runs.directory import Run

    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(Run.open_finished(tiny_run), path)
    return path


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and checkpoints, where there is one."""
    folder = os.environ.get("DVERGE_TEST_DATA")
    if not folder:
        pytest.skip("DVERGE_TEST_DATA is not set: no real images to test on")
    return Path(folder)
