"""Torchvision's published weights: their names, their preprocessing and their files."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch.hub import HASH_REGEX
from torchvision import models
from torchvision.models import WeightsEnum

from dverge_serve.errors import UserError, nearest
from dverge_serve.files import sha256

PREFIX = "torchvision:"


def find(architecture: str, weights: str) -> WeightsEnum:
    """Return torchvision's entry for the weights of an architecture.

    Args:
        architecture: `torchvision:<name>`.
        weights: a name such as `IMAGENET1K_V1` or `DEFAULT`, also with the class before it as in
            `ResNet18_Weights.DEFAULT`.

    Raises:
        UserError: an architecture that is not torchvision's, or that has no such weights.
    """
    name = architecture.removeprefix(PREFIX)
    if not architecture.startswith(PREFIX) or name not in models.list_models(module=models):
        raise UserError(
            f"weights = {weights} with architecture = {architecture}",
            "a classifier of torchvision",
            f"e.g. `overrides` architecture={PREFIX}mobilenet_v2",
        )
    known = models.get_model_weights(name)
    entry: WeightsEnum | None = known.__members__.get(weights.removeprefix(f"{known.__name__}."))
    if entry is None:
        raise UserError(
            f"'{architecture}' has no weights '{weights}'",
            f"DEFAULT or one of {', '.join(each.name for each in known)}",
            nearest(weights, [each.name for each in known]),
        )
    return entry


def preprocessing(
    entry: WeightsEnum, data: dict[str, Any], *, resized: bool = True
) -> dict[str, Any]:
    """Return the settings of `data`, completed by the preprocessing that the weights expect.

    Settings that are there stay. A crop of another size keeps the proportion of resize to crop.

    Args:
        entry: of the weights.
        data: a recipe's table `data`.
        resized: whether its images take any size; otherwise only the normalisation is completed.
    """
    wanted = entry.transforms()
    size, cover = wanted.crop_size[0], wanted.resize_size[0]
    crop = data.get("crop", [size, size])
    mean, std = list(wanted.mean), list(wanted.std)
    if data.get("mode") == "L":  # repeated to three channels behind the normalisation
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    found = (
        {}
        if not resized
        else {
            "crop": crop,
            "resize": [round(side * cover / size) for side in crop],
            "interpolation": wanted.interpolation.value,
        }
    )
    if "mean" not in data and "std" not in data:
        found |= {"mean": mean, "std": std}
    return found | data


def paths(architectures: Sequence[str], weights: str) -> tuple[str, ...]:
    """Return the paths of the files that hold the weights, downloaded where they are missing.

    Returns:
        one path where all architectures are one; otherwise one for each.

    Raises:
        UserError: no such weights, no connection, or a damaged file.
    """
    alike = len(set(architectures)) == 1
    entries = [find(each, weights) for each in architectures[: 1 if alike else None]]
    return tuple(str(_file(entry)) for entry in entries)


def _file(entry: WeightsEnum) -> Path:
    name = str(entry.url).rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where torch says that it downloads
                entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"cannot download {entry.url} ({reason})",
                "a network connection",
                f"put the file at {path}, or give it as `start`",
            ) from error
    hashed = re.search(HASH_REGEX, path.name)
    if hashed and not sha256(path.read_bytes()).startswith(hashed[1]):
        raise UserError(
            f"{path} is damaged: its hash does not begin with the {hashed[1]} of its name",
            "the published file",
            "remove it, and it is downloaded again",
        )
    return path
