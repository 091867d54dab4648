"""Surrogates that are given: finished runs and published weights files, in any mixture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dverge_serve.errors import UserError
from export.published_checkpoint import read_published
from training.models.member import Member
from training.models.weights_file import SUFFIXES
from training.runs.directory import Run
from verification.surrogate import Origin, Surrogate, alone, opened


def given_surrogates(
    paths: Sequence[Path], labels: Sequence[str], shape: tuple[int, int, int], device: torch.device
) -> list[Surrogate]:
    """Return finished runs and published files as surrogates for a model.

    Each of several networks is one ensemble, and each network of it is a surrogate, too.

    Args:
        paths: run directories, weights files, or folders of them.
        labels: the model's classes; the logits of published files are taken to be in their order.
        shape: channels, height and width of its images.
        device: where gradients will be taken.

    Raises:
        UserError: none there, one with other classes or another input, or two of one name.
    """
    found: dict[str, list[Surrogate]] = {}
    for path in [each for given in paths for each in _origins(given)]:
        if path.name in found:
            raise UserError(f"two surrogates are called {path.name}", "different names")
        origin, members = (_file if path.is_file() else _run)(path, tuple(labels), shape)
        size = len(members)
        parts = {path.name: tuple(range(size))} | alone(path.name, size)
        found[path.name] = opened(parts, origin, members, device)
    return [each for group in found.values() for each in group]


def _origins(path: Path) -> list[Path]:
    """Return the run directories and weights files that a path names."""
    if path.is_file() or (path / "checkpoint.json").is_file():
        return [path]
    # Resolved: `latest` is a link to one of the others.
    runs = sorted({each.parent.resolve() for each in path.glob("*/checkpoint.json")})
    files = sorted(each for each in path.glob("*") if each.suffix in SUFFIXES and each.is_file())
    if not runs and not files:
        raise UserError(
            f"no finished run and no weights file in {path}",
            f"run directories, or files ending in {', '.join(SUFFIXES)}",
        )
    return [*runs, *files]


def _run(
    path: Path, labels: tuple[str, ...], shape: tuple[int, int, int]
) -> tuple[Origin, list[Member]]:
    run = Run.open_finished(path)
    if run.labels != labels:
        raise UserError(
            f"the surrogate {path} has {len(run.labels)} classes ({', '.join(run.labels[:3])})",
            f"the model's {len(labels)} ({', '.join(labels[:3])})",
        )
    if (found := run.config.data.preprocess.shape) != shape:
        raise UserError(f"the surrogate {path} takes {found}", f"the model's {shape}")
    return Origin.of_run(run), run.members()


def _file(
    path: Path, labels: tuple[str, ...], shape: tuple[int, int, int]
) -> tuple[Origin, list[Member]]:
    found = read_published(path)
    classes, channels = found.resnet.classes, found.resnet.channels
    if classes != len(labels):
        told = f"the model's {len(labels)} ({', '.join(labels[:3])})"
        raise UserError(f"the surrogate {path} has {classes} classes", told)
    if channels != shape[0]:
        raise UserError(f"the surrogate {path} reads {channels} channels", f"the model's {shape}")
    return Origin.of_file(path, found, labels, shape[1:]), found.members
