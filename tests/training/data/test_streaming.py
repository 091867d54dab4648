"""Images that stay on disk: the very batches that images in memory would give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dverge_serve.errors import UserError
from tests.training.stopping import stopped_at_its_first_state
from training.config import Config, Data
from training.data import streaming
from training.data.sources import image_files
from training.data.splits import Split, batches, load_training
from training.data.streaming import Streamed, streams
from training.schedules import Dverge, Schedule
from training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise of several sizes, told apart by a tint."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 3)):
        for place, name in enumerate(("ant", "bee", "cat")):
            where = root / part / name
            where.mkdir(parents=True)
            for number in range(count):
                height, width = draw.integers(8, 20, 2)
                pixels = draw.integers(0, 120, (height, width, 3), dtype=np.uint8)
                pixels[:, :, place] += 120
                Image.fromarray(pixels).save(where / f"{number}.png")
    return root


def from_folder(path: Path, **more: Any) -> Data:
    return Data(name="imagefolder", path=str(path), crop=(8, 8), pad=2, **more)


def from_disk(data: Data, workers: int = 0) -> Streamed:
    train = load_training(replace(data, memory_gb=0, workers=workers)).train
    assert isinstance(train, Streamed)
    return train


def in_memory(data: Data) -> Split:
    train = load_training(replace(data, memory_gb=1)).train
    assert isinstance(train, Split)
    return train


def expect_equal_epochs(one: Split | Streamed, other: Split | Streamed, data: Data) -> None:
    for epoch in range(2):
        pairs = zip(
            batches(one, 8, data, 0, "t", epoch),
            batches(other, 8, data, 0, "t", epoch),
            strict=True,
        )
        count = 0
        for (images, labels), (same, equal) in pairs:
            assert torch.equal(images, same)
            assert torch.equal(labels, equal)
            count += len(labels)
        assert count == len(one) == len(other)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_bit_for_bit_those_of_images_in_memory(photos: Path, workers: int) -> None:
    """Order and augmentation included, epoch after epoch, whatever the number of workers."""
    data = from_folder(photos)
    stored, streamed = in_memory(data), from_disk(data, workers)
    state = torch.get_rng_state()
    expect_equal_epochs(streamed, stored, data)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_shuffles_are_read_at_once_and_one_may_be_left_in_the_middle(photos: Path) -> None:
    data = from_folder(photos)
    stored, streamed = in_memory(data), from_disk(data, 1)
    left = batches(streamed, 8, data, 0, "left")
    next(left)
    kept = batches(streamed, 8, data, 0, "kept")
    first, _ = next(kept)
    del left  # its worker goes to the next that asks
    expect_equal_epochs(streamed, stored, data)
    rest = [first, *(images for images, _ in kept)]
    wanted = [images for images, _ in batches(stored, 8, data, 0, "kept")]
    assert all(torch.equal(one, other) for one, other in zip(rest, wanted, strict=True))


def test_what_is_learnt_from_all_images_is_the_same(photos: Path) -> None:
    data = from_folder(photos)
    stored, streamed = in_memory(data), from_disk(data)
    assert streamed.sha256 == stored.sha256
    assert torch.equal(streamed.levels, stored.levels)
    assert torch.equal(streamed.labels, stored.labels)
    one, other = (load_training(replace(data, memory_gb=most)).holdout for most in (0, 1))
    assert one.sha256 == other.sha256


def test_images_stream_only_where_they_do_not_fit(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = from_folder(photos)
    _, files = image_files(data, "train")
    size = 60 * 3 * 8 * 8
    assert not streams(files, replace(data, memory_gb=size / 1e9))
    assert streams(files, replace(data, memory_gb=(size - 1) / 1e9))
    monkeypatch.setattr(streaming, "_free_bytes", lambda: 2 * size)
    assert not streams(files, data)
    monkeypatch.setattr(streaming, "_free_bytes", lambda: 2 * size - 2)
    assert streams(files, data)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = streaming._free_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert streaming._free_bytes() < alone / 2


def test_unreadable_images_are_found_before_training(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for number in range(20):
        (tmp_path / "photos" / "train" / "ant" / f"{number}.png").write_bytes(b"not an image")
    data = from_folder(tmp_path / "photos", memory_gb=0, workers=0, holdout=0.02)
    with pytest.raises(UserError, match=r"of \d+ images in .*train cannot be read: .*\.png") as one:
        train(tiny(data), tmp_path / "run", device=CPU)
    assert "\n" not in str(one.value)
    assert not (tmp_path / "run").exists()


def test_an_image_lost_on_the_way_is_named(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    data = from_folder(tmp_path / "photos")
    streamed = from_disk(data)
    shutil.rmtree(tmp_path / "photos" / "train" / "bee")
    with pytest.raises(UserError, match=r"cannot be read: .*bee.*No such file"):
        list(batches(streamed, 8, data, 0, "t"))


def test_a_worker_that_is_killed_is_one_line(photos: Path) -> None:
    data = from_folder(photos)
    streamed = from_disk(data, 1)
    found = streamed.fetch([torch.tensor([row]) for row in range(len(streamed))])
    here = psutil.Process()
    before = {process.pid for process in here.children(recursive=True)}
    next(found)
    # The server they come from may have been started just now, too.
    started = [each for each in here.children(recursive=True) if each.pid not in before]
    max(started, key=lambda each: each.create_time()).kill()
    with pytest.raises(UserError, match=r"was ended.*data\.workers"):
        list(found)


BUSY = """
import sys, time
import psutil, torch
from training.config import Data
from training.data.splits import load_training

if __name__ == "__main__":
    data = Data(name="imagefolder", path=sys.argv[1], crop=(96, 96), memory_gb=0, workers=2)
    streamed = load_training(data).train
    found = streamed.fetch(torch.split(torch.arange(len(streamed)), 9))
    next(found)
    print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_the_workers_of_a_training_that_is_killed_end(photos: Path, tmp_path: Path) -> None:
    """Even those that are handing over more than a pipe holds."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, str(script), str(photos)], stdout=subprocess.PIPE, text=True, env=here
    ) as busy:
        assert busy.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in busy.stdout.readline().split()]
        assert len(workers) >= 2
        busy.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def tiny(data: Data, **more: Any) -> Config:
    return Config(
        name="tiny",
        architecture="resnet8",
        width=8,
        members=2,
        batch_size=16,
        precision="fp32",
        data=data,
        standard=Schedule(epochs=2),
        dverge=Dverge(epochs=2, steps=2),
        **more,
    )


def test_a_run_from_disk_ends_in_the_same_bytes_and_resumes_in_either_way(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = from_folder(photos)
    stored = train(tiny(replace(data, memory_gb=1)), tmp_path / "stored", device=CPU)
    streamed = tiny(replace(data, memory_gb=0, workers=1))
    stopped_at_its_first_state(streamed, tmp_path / "run", monkeypatch)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["workers"] == 1
    other = replace(streamed, data=replace(streamed.data, workers=0))
    run = train(other, tmp_path / "run", device=CPU, resume=True)
    for name in ("standard", "members"):
        file = f"{name}.safetensors"
        assert (run.path / file).read_bytes() == (stored.path / file).read_bytes()
    assert run.checkpoint["train_sha256"] == stored.checkpoint["train_sha256"]
