"""Tiny members and images that the tests of this room share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.config import Config, Data
from training.data.splits import Split
from training.data.streaming import Streamed
from training.models.build import build_members
from training.models.member import Member
from training.recipe import load_recipe

DEPTH = 8


def tiny_members(
    count: int,
    *,
    channels: int = 1,
    width: int = 8,
    classes: int = 4,
    architecture: str = "resnet8",
) -> list[Member]:
    """Return float64 members whose BatchNorm is not at its starting values."""
    config = Config(
        name="tiny",
        architecture=architecture,
        width=width,
        members=max(count, 2),
        data=Data(mode="L" if channels == 1 else "RGB", crop=(8, 8)),
    )
    mean, std = [0.4, 0.5, 0.6][:channels], [0.3, 0.2, 0.25][:channels]
    members = build_members(config, classes, mean, std)[:count]
    draw = torch.Generator().manual_seed(7)
    for member in members:
        member.double()
        for name, tensor in member.state_dict().items():
            random = torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
            if name.endswith("running_mean"):
                tensor.copy_(random - 0.5)
            elif name.endswith(("running_var", "norm.weight", "shortcut.1.weight")):
                tensor.copy_(random + 0.5)
            elif name.endswith(("norm.bias", "shortcut.1.bias")):
                tensor.copy_(random - 0.5)
    return members


def tiny_images(count: int, *, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    """Return float64 images in `[0,1]`, some pixels at the ends of the range."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand((count, channels, size, size), generator=draw, dtype=torch.float64)
    return (images * 1.2 - 0.1).clamp(0, 1)


def tiny_config(**overrides: Any) -> Config:
    """Return a run on a few digits that trains in about a second; `__` stands for a dot."""
    settings: dict[str, Any] = {
        "width": 8,
        "members": 2,
        "batch_size": 16,
        "standard.epochs": 2,
        "dverge.epochs": 2,
        "data.train_limit": 100,
        "data.test_limit": 20,
    }
    return load_recipe(
        "digits", settings | {key.replace("__", "."): value for key, value in overrides.items()}
    )


def stored(split: Split | Streamed) -> Split:
    """Return a split that is known to be in memory."""
    assert isinstance(split, Split)
    return split


def rows(split: Split | Streamed) -> list[bytes]:
    return [image.numpy().tobytes() for image in stored(split).images]
