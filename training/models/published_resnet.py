"""ResNets for small images as published files name them, recognised by their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dverge_serve.errors import UserError
from training.models.member import Member
from training.models.resnet import resnet_stages
from training.models.state_dict import fit
from training.models.weights_file import Network

EXPECTED = "a CIFAR ResNet: conv1, layer1 to layer3 of equally many blocks, fc"
# What networks were trained with whose files do not carry it, by their last layer's name: that of
# the published DVERGE code, and ImageNet's, which github.com/akamaster/pytorch_resnet_cifar10 uses.
NORMALISATION = {
    "fc": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "linear": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class PublishedResNet:
    """What a network in a file is: everything but its weights.

    Args:
        architecture: by our name. Activations leave no trace in a file: they count as ReLU.
        width, channels, classes: as its tensors show.
        mean, std: per channel, for images in `[0,1]`; the file's own, or what is known.
    """

    architecture: str
    width: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.architecture} of width {self.width}"

    @classmethod
    def recognise(cls, network: Network, file: str | Path) -> PublishedResNet:
        """Read architecture and sizes off the tensors.

        Raises:
            UserError: it is no such network; `file` is named.
        """
        tensors = network.tensors
        if "stages.0.conv.weight" in tensors:  # of a run
            stage, blocks = _own_depth(tensors)
            names = "stages.0.conv.weight", f"stages.{stage}.linear.weight"
        else:
            blocks = _depth(tensors)
            names = "conv1.weight", f"{_last(tensors)}.weight"
        first, final = (tensors.get(name) for name in names)
        if first is None or final is None or first.ndim != 4 or final.ndim != 2 or not blocks:
            thirds = [len(_blocks(tensors, third)) for third in (1, 2, 3)]
            raise UserError(
                f"{file}: {network.name} has {len(tensors)} tensors in thirds of {thirds} blocks",
                EXPECTED,
            )
        bottleneck = _bottleneck(tensors)
        kind = ("-bottleneck" if bottleneck else "") + ("" if _projects(tensors) else "-pad")
        architecture = f"resnet{(9 if bottleneck else 6) * blocks + 2}{kind}"
        (width, channels), classes = first.shape[:2], len(final)
        mean, std = network.mean, network.std
        if not mean:
            mean, std = NORMALISATION[_last(tensors)]
        if not len(mean) == len(std) == channels:
            raise UserError(
                f"{file}: {network.name} reads {channels} channels and normalises {len(mean)}",
                "a mean and a std for each channel",
            )
        return cls(architecture, width, channels, classes, mean, std)

    def member(self, network: Network, file: str | Path) -> Member:
        """Return the network with its weights, in evaluation mode, on the CPU.

        Raises:
            UserError: tensors are missing, foreign, of other shapes or not finite.
        """

        def fitted(device: str) -> Member:
            with torch.device(device):
                sizes = self.architecture, self.channels, self.width, self.classes
                made = Member(resnet_stages(*sizes), self.mean, self.std)
            names = published_names(made.state_dict(), network.tensors)
            tracked = {name for name in names if name.endswith("_tracked")}
            fit(
                made,
                network.tensors,
                file=str(file),
                who=network.name,
                expected="the tensors of a CIFAR ResNet",
                names=names,
                optional={"mean", "std"} | tracked,
            )
            return made

        fitted("meta")  # a file that lies about its sizes costs no memory
        return fitted("cpu").eval().requires_grad_(False)


def is_published(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have the names of a CIFAR ResNet's in published files."""
    return _depth(tensors) > 0 and f"{_last(tensors)}.weight" in tensors


def published_names(own: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what a file calls each tensor of one of our ResNets; the same where it is a run's.

    Args:
        own: our names.
        tensors: of the file.
    """
    own = list(own)
    if not is_published(tensors):
        return {name: name for name in own}
    places = {name: name.split(".", 3) for name in own if name.startswith("stages.")}
    last = max(int(at) for _, at, *_ in places.values())
    parts = 3 if _bottleneck(tensors) else 2
    shortcut = "shortcut" if any(".shortcut." in name for name in tensors) else "downsample"
    found = {name: name for name in own}
    for name, (_, at, part, rest) in places.items():
        stage = int(at)
        if stage in (0, last):
            names = {"conv": "conv1", "norm": "bn1", "linear": _last(tensors)}
            found[name] = f"{names[part]}.{rest}"
        else:
            block, within = divmod(stage - 1, parts)
            third, number = divmod(block, (last - 1) // parts // 3)
            names = {"conv": f"conv{within + 1}", "norm": f"bn{within + 1}", "shortcut": shortcut}
            found[name] = f"layer{third + 1}.{number}.{names[part]}.{rest}"
    return found


def _last(tensors: Mapping[str, Tensor]) -> str:
    return "linear" if "linear.weight" in tensors else "fc"


def _bottleneck(tensors: Mapping[str, Tensor]) -> bool:
    entry = tensors.get("stages.1.conv.weight")
    own = entry is not None and entry.shape[-1:] == (1,)
    return own or "layer1.0.conv3.weight" in tensors


def _projects(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether shortcuts have parameters."""
    return any(".shortcut." in name or ".downsample." in name for name in tensors)


def _blocks(tensors: Mapping[str, Tensor], third: int) -> set[str]:
    return {name.split(".")[1] for name in tensors if name.startswith(f"layer{third}.")}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """Return how many blocks each third has; 0: they are no thirds."""
    counts = {len(_blocks(tensors, third)) for third in (1, 2, 3)}
    return counts.pop() if len(counts) == 1 and not _blocks(tensors, 4) else 0


def _own_depth(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the last stage and how many blocks each third has, by our names; 0: no thirds."""
    stages = [int(found[1]) for name in tensors if (found := re.match(r"stages\.(\d+)\.", name))]
    blocks, rest = divmod(max(stages) - 1, 9 if _bottleneck(tensors) else 6)
    return max(stages), 0 if rest else blocks
