"""Adversarial images of source models, made once before a stage and kept in the run directory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.files import atomic_path, pretty_json, read_json, write_atomic
from dverge_serve.progress import Progress
from training.config import Config
from training.data.splits import TrainingData, augment, to_float
from training.device import autocast_dtype, send
from training.method_registry import METHODS
from training.methods.adversarial import pgd_examples
from training.methods.source_models import SourceModel, Train, given_sources, trained_sources
from training.models.bn_folding import folded
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.runs.directory import Run
from training.runs.lock import held
from training.schedules import Transfer
from training.seeds import generator

IMAGES, RECORD = "sources.npy", "sources.json"
AT_A_TIME = 256  # images; the random starts depend on it


@dataclass(frozen=True)
class StoredImages:
    """Adversarial copies of the training images, and the networks they were made on.

    Args:
        images: uint8 `[sources x copies, N, C, H, W]`, on disk.
        labels: int64 `[N]`, on the CPU.
        sources: an entry of each network, for the run's record.
    """

    images: npt.NDArray[np.uint8]
    labels: Tensor
    sources: Sequence[dict[str, Any]]

    def draw(
        self, count: int, device: torch.device, *seed_path: int | str
    ) -> tuple[Tensor, Tensor]:
        """Return float32 images `[count, C, H, W]` in `[0,1]` and labels, each of a random source.

        Image, source and copy are drawn uniformly and with replacement, for `seed_path` (see
        `training.seeds`).
        """
        draw = generator(*seed_path)
        which = torch.randint(len(self.images), (count,), generator=draw)
        rows = torch.randint(len(self.labels), (count,), generator=draw)
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[which.numpy(), rows.numpy()]))
        return to_float(send(pixels, device)), send(self.labels[rows], device)

    @classmethod
    def stand_in(cls, config: Config, data: TrainingData) -> StoredImages:
        """Return black images in place of those of a run that has not begun, to time its steps."""
        shape = (1, len(data.train), *config.data.preprocess.shape)
        return cls(np.broadcast_to(np.uint8(0), shape), data.train.labels.cpu(), [])


def check_sources(config: Config, data: TrainingData, run: Run) -> None:
    """Refuse source models that cannot be used, before anything is written.

    Raises:
        UserError: what `given_sources` raises.
    """
    if METHODS[config.method].sources and not (run.path / RECORD).is_file():
        given_sources(config, data)


def describe_images(config: Config, data: TrainingData) -> list[str]:
    """Return what the images of a run that has not begun will cost, a line, if it needs some."""
    if not METHODS[config.method].sources:
        return []
    settings, given = config.transfer, len(given_sources(config, data))
    count = (given or settings.networks) * settings.copies * len(data.train)
    size = count * math.prod(config.data.preprocess.shape) / 1e9
    which = f"{given} sources" if given else f"{settings.networks} sources, which are trained first"
    return [
        f"{settings.copies} adversarial copies of {len(data.train):,} images from each of {which}: "
        f"{count * settings.steps:,} gradient evaluations, {size:.1f} GB in the run directory "
        "until it is finished"
    ]


def keep_images(
    config: Config, data: TrainingData, run: Run, device: torch.device, train: Train
) -> StoredImages | None:
    """Return the stored images of a run, made if they are not there: None if it needs none.

    A run that goes on finds its images in its directory and needs the sources no more. Processes
    that train together wait for the one that makes them.

    Args:
        config, data: of the run.
        run: in whose directory they are.
        device: where they are made.
        train: trains the sources that are not given.
    """
    if not METHODS[config.method].sources:
        return None
    path = run.path / IMAGES
    with held(path.with_suffix(".lock"), "makes adversarial images", "wait for it", wait=True):
        record = _record(run.path)
        if record is None:
            models = given_sources(config, data) or trained_sources(config, data, device, train)
            _make(path, models, config, data, device)
            record = {"sha256": _sha256(path), "sources": [each.to_json() for each in models]}
            write_atomic(run.path / RECORD, pretty_json(record))
    images = np.load(path, mmap_mode="r")
    return StoredImages(images, data.train.labels.cpu(), record["sources"])


def _record(folder: Path) -> dict[str, Any] | None:
    """Return what is recorded of the images in a run directory, if they are all there."""
    if not (folder / IMAGES).is_file() or not (folder / RECORD).is_file():
        return None
    record: dict[str, Any] = read_json(folder / RECORD, "the record of a run's sources")
    return record if record.get("sha256") == _sha256(folder / IMAGES) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(
    path: Path,
    models: Sequence[SourceModel],
    config: Config,
    data: TrainingData,
    device: torch.device,
) -> None:
    """Write each source's adversarial images of every copy, each copy augmented anew."""
    settings, count = config.transfer, len(data.train)
    networks = [_ready(model.network, config, device) for model in models]
    shape = (len(models) * settings.copies, count, *config.data.preprocess.shape)
    rows = torch.split(torch.arange(count), AT_A_TIME)
    label = f"adversarial images of {len(models)} networks"
    with (
        atomic_path(path, math.prod(shape)) as part,
        Progress(label, shape[0] * count) as progress,
    ):
        into = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        for copy in range(settings.copies):
            draw = generator(config.seed, "copy", copy)
            for own, (pixels, labels) in zip(rows, data.train.fetch(rows), strict=True):
                clean = augment(pixels, config.data, draw).to(device)
                when = (config.seed, "start", copy, int(own[0]))
                attack = partial(_attack, clean, labels.to(device), settings, when)
                made = side_by_side(attack, enumerate(networks), device)
                for index, images in enumerate(made):
                    into[index * settings.copies + copy, own.numpy()] = images.cpu().numpy()
                progress.advance(len(models) * len(own))
        into.flush()


def _attack(
    pixels: Tensor,
    labels: Tensor,
    settings: Transfer,
    when: tuple[int | str, ...],
    numbered: tuple[int, Member],
) -> Tensor:
    """Return PGD examples of a network, uint8 as the clean images are, and within eps of them."""
    (index, network), clean = numbered, to_float(pixels)
    made = pgd_examples(network, clean, labels, settings, *when, index)
    most = int(settings.eps * 255 + 1e-6)
    change = ((made - clean) * 255).round().clamp(-most, most)
    return (pixels + change).clamp(0, 255).to(torch.uint8)


def _ready(network: Member, config: Config, device: torch.device) -> Member:
    copy = folded(network).to(device).to(memory_format=torch.channels_last)
    copy.compute = autocast_dtype(config.precision, device)
    return copy
