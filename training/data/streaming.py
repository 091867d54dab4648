"""Images that stay on disk: worker processes decode them as training asks for them."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dverge_serve.cores import cores
from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess
from dverge_serve.progress import Progress
from training.config import Data
from training.data.sources import ImageFiles, decode, refuse_broken
from training.device import send

SCAN = 64  # images a batch when all are looked through
MOST_WORKERS = 8
Decoded = tuple[npt.NDArray[np.uint8], list[str]]  # images, and which files have none


@dataclass(frozen=True)
class Streamed:
    """Labelled images on disk, with the interface of a `Split` in memory.

    Given the same files it has the same hash and gives the same images, whatever the number of
    workers: they only decode; order and augmentation are drawn where the batches are made.

    Args:
        files: the images' files.
        workers: processes that decode; 0: this one does.
        device: where the images go.
    """

    files: ImageFiles
    workers: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _readers: list[_Reader] = field(default_factory=list)  # idle ones, for the next epoch

    def __len__(self) -> int:
        return len(self.files.paths)

    @property
    def labels(self) -> Tensor:
        """Classes, int64 `[N]`, on the CPU."""
        return torch.from_numpy(self.files.targets)

    def to(self, device: torch.device) -> Streamed:
        """Return the same images, bound for `device`."""
        return replace(self, device=device)

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images uint8 `[n, C, H, W]` and labels `[n]` of each part, read ahead.

        Args:
            parts: the rows of each, `[n]`, on the CPU.

        Raises:
            UserError: a file that cannot be read any more, or a worker that was ended.
        """
        rows = list(parts)
        reader = self._readers.pop() if self._readers else _Reader(self.files, self.workers)
        labels = self.labels
        try:
            for part, (pixels, broken) in zip(rows, reader.read(rows), strict=True):
                refuse_broken(broken, len(part), self.files.folder)
                images = torch.from_numpy(pixels)
                yield send(images, self.device), send(labels[part], self.device)
        finally:
            self._readers.append(reader)

    @property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels, equal to a `Split`'s in memory."""
        return self._scan[0]

    @property
    def levels(self) -> Tensor:
        """How often each of the 256 levels occurs in each channel, float64 `[C, 256]`."""
        return self._scan[1]

    @cached_property
    def _scan(self) -> tuple[str, Tensor]:
        """Read every image once: what is learnt from it, and whether all can be read."""
        shape = self.files.preprocess.shape
        digest = hashlib.sha256(repr((len(self), *shape)).encode())
        counts = np.zeros((shape[0], 256), dtype=np.int64)
        broken: list[str] = []
        rows = torch.split(torch.arange(len(self)), SCAN)
        reader = _Reader(self.files, self.workers)
        with Progress("looking through the training images", len(self)) as progress:
            for pixels, unread in reader.read(rows):
                digest.update(pixels.tobytes())
                for channel, seen in zip(counts, pixels.swapaxes(0, 1), strict=True):
                    channel += np.bincount(seen.ravel(), minlength=256)
                broken += unread
                progress.advance(len(pixels))
        refuse_broken(broken, len(self), self.files.folder)
        digest.update(self.files.targets.tobytes())
        self._readers.append(reader)
        return digest.hexdigest(), torch.from_numpy(counts).double()


def streams(files: ImageFiles, data: Data) -> bool:
    """Whether the decoded images would take more memory than `data.memory_gb` allows."""
    budget = _free_bytes() / 2 if data.memory_gb is None else data.memory_gb * 1e9
    return len(files.paths) * math.prod(files.preprocess.shape) > budget


def streamed(files: ImageFiles, data: Data) -> Streamed:
    """Return the images of `files` as a stream with the workers that `data.workers` asks for."""
    workers = min(cores(), MOST_WORKERS) if data.workers is None else data.workers
    return Streamed(files, workers)


class _Reader:
    """Worker processes that decode images, kept from epoch to epoch."""

    def __init__(self, files: ImageFiles, workers: int) -> None:
        self._files, self._plan = files, _Plan()
        more: dict[str, Any] = {}
        if workers:
            # Forking a process with threads is unsafe: workers come from a clean server instead.
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context(
                "forkserver" if "forkserver" in methods else "spawn"
            )
            context.set_forkserver_preload([__name__])
            more = {"multiprocessing_context": context, "persistent_workers": True}
        self._loader: DataLoader[Any] = DataLoader(
            _Decoder(files.preprocess),
            batch_sampler=self._plan,  # of paths, not of row numbers
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # leaves torch's global one alone
            **more,
        )

    def read(self, rows: Sequence[Tensor]) -> Iterator[Decoded]:
        """Yield each part's images, decoded ahead of time."""
        paths = self._files.paths
        self._plan.parts = [[str(paths[row]) for row in part.tolist()] for part in rows]
        try:
            yield from self._loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a process that reads images was ended, perhaps for want of memory",
                next_step="lower data.workers and go on with `resume`",
            ) from error


class _Plan:
    """Batch sampler: the paths that the workers read next."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []

    def __iter__(self) -> Iterator[list[str]]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _Decoder(Dataset[Any]):
    """Data set that decodes batches of paths, in a worker."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess

    def __getitems__(self, paths: list[str]) -> Decoded:
        """Return arrays, not tensors, whose shared memory containers are often short of."""
        return decode([Path(path) for path in paths], self._preprocess)


def _unchanged(batch: Any) -> Any:
    return batch


def _end_with_parent(worker: int) -> None:
    """Let this worker end when training is killed, even while it waits to hand over its images."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _free_bytes() -> float:
    """Return how much memory this process may still take, of which others here get a share."""
    free = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # a container's own limit, where there is one
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
