"""Fusing: an ensemble as one grouped network, or as branches. Both compute the same logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dverge_serve.engine.card import FusionMode, members_per_group
from training.models.bn_folding import folded
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import Head

# What may stand before the last layer of a member that is to be grouped, beside convolutions:
# layers that treat channels independently. Anything else stays in branches.
_CHANNELWISE = (
    *(nn.Identity, nn.Sequential, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Flatten),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)


class Branches(nn.Module):
    """One branch for each member, of any mix of architectures."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.members = ensemble.members

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]` and member logits `[batch, members, classes]`.

        Args:
            images: float32 `[batch, channels, height, width]` in `[0,1]`.
        """
        logits = [member(images) for member in self.members]
        # Add and Mul, not ReduceMean, whose newer versions foreign importers refuse.
        total = logits[0]
        for each in logits[1:]:
            total = total + each
        return total * (1.0 / len(logits)), torch.stack(logits, dim=1)


class Grouped(nn.Module):
    """One network that is as many times as wide as it has members.

    BatchNorm is folded and so is the division by `std`, the first convolutions read the same image
    and are concatenated, the later ones are the groups of grouped convolutions, and the mean of the
    members' logits is one matrix product. A third of the operations for three members, so a third
    of the times that threads must wait for each other.

    Args:
        members: for which `can_group` holds, in evaluation mode.
        total: how many members the whole ensemble has; the logits are these members' share of the
            mean.
    """

    mean: Tensor

    def __init__(self, members: Sequence[Member], total: int) -> None:
        super().__init__()
        parts = [folded(member) for member in members]
        self.register_buffer("mean", parts[0].mean)
        stages = [deepcopy(stage) for stage in parts[0].stages[:-1]]
        for at, stage in enumerate(stages):
            for name in _named(stage, nn.Conv2d):
                convolutions = [part.stages[at].get_submodule(name) for part in parts]
                joined = _grouped(convolutions, shared=at == 0)  # type: ignore[arg-type]
                if at == 0:
                    joined.weight = _fixed(joined.weight / parts[0].std)
                stage.set_submodule(name, joined)
        self.stages = nn.ModuleList(stages)
        self.last = _Last([part.stages[-1] for part in parts], total)  # type: ignore[misc]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]` and member logits `[batch, members, classes]`."""
        features, skip = images - self.mean, images
        for stage in self.stages:
            features, skip = stage(features, skip)
        both: tuple[Tensor, Tensor] = self.last(features)
        return both


class Networks(nn.Module):
    """Grouped networks side by side, each with its members' share of the mean."""

    def __init__(self, networks: Sequence[Grouped]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]` and member logits `[batch, members, classes]`."""
        shares, own = zip(*(network(images) for network in self.networks), strict=True)
        return sum(shares[1:], start=shares[0]), torch.cat(own, dim=1)


class _Last(nn.Module):
    """The members' last layers: their share of the mean of all logits, and each member's own.

    Two products of the pooled features: cutting one product's result in two takes longer.
    """

    def __init__(self, heads: Sequence[Head], total: int) -> None:
        super().__init__()
        self.active = heads[0].active
        layers = [head.linear for head in heads]
        features, self.shape = layers[0].in_features, (len(layers), layers[0].out_features)
        weights = [layer.weight.detach() for layer in layers]
        biases = torch.stack([layer.bias.detach() for layer in layers])
        self.mean = nn.Linear(features * len(layers), self.shape[1])
        self.own = nn.Linear(features * len(layers), math.prod(self.shape))
        self.mean.weight = _fixed(torch.cat(weights, 1) / total)
        self.mean.bias = _fixed(biases.sum(0) / total)
        self.own.weight = _fixed(torch.block_diag(*weights))  # type: ignore[no-untyped-call]
        self.own.bias = _fixed(biases.flatten())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # A pooling layer, not a mean over two axes: runtimes and importers know it better.
        pooled = F.avg_pool2d(self.active(features), features.shape[-2:]).flatten(1)
        return self.mean(pooled), self.own(pooled).unflatten(1, self.shape)


def can_group(ensemble: Ensemble) -> bool:
    """Whether the members are alike enough, and plain enough, to become one network."""
    parts = [folded(member) for member in ensemble if type(member) is Member]
    if len(parts) < max(2, len(ensemble)):
        return False
    first = parts[0]
    for part in parts:
        same = torch.equal(part.mean, first.mean) and torch.equal(part.std, first.std)
        if not same or _shape(part) != _shape(first):
            return False
    stem, *middle = [_layers(stage) for stage in first.stages[:-1]]
    convolutions = [layer for layers in (stem, *middle) for layer in layers]
    return (
        all(isinstance(layer, nn.Conv2d) for layer in convolutions)
        and type(first.stages[-1]) is Head
        and len(stem) == 1
        and bool(stem[0].groups == 1)
    )


def fuse(ensemble: Ensemble, form: FusionMode) -> nn.Module:
    """Return the ensemble in one of its forms; both compute the same two outputs."""
    if form == "grouped":
        alike = [member for member in ensemble if isinstance(member, Member)]
        starts = range(0, len(alike), members_per_group(len(alike)))
        networks = [Grouped(alike[at : at + starts.step], len(alike)) for at in starts]
        return (Networks(networks) if len(networks) > 1 else networks[0]).eval()
    return Branches(ensemble).eval()


def _layers(stage: nn.Module) -> list[nn.Module]:
    """Return a stage's layers, except those that treat every channel alike."""
    return [
        module
        for name, module in stage.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        or (name and not list(module.children()) and not isinstance(module, _CHANNELWISE))
    ]


def _named(stage: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in stage.named_modules() if isinstance(module, kind)]


def _shape(member: nn.Module) -> str:
    """Return what two members must share: the layers with their settings, and the shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in member.state_dict().items()}
    return f"{member!r} {shapes}"


def _grouped(convolutions: Sequence[nn.Conv2d], *, shared: bool) -> nn.Conv2d:
    """Return one convolution for all; `shared` ones read the same channels."""
    first, count = convolutions[0], len(convolutions)
    joined = nn.Conv2d(
        first.in_channels * (1 if shared else count),
        first.out_channels * count,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        groups=1 if shared else first.groups * count,
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
    )
    joined.weight = _joined([each.weight for each in convolutions])
    if first.bias is not None:
        joined.bias = _joined([each.bias for each in convolutions if each.bias is not None])
    return joined


def _joined(tensors: Sequence[Tensor]) -> nn.Parameter:
    return _fixed(torch.cat([tensor.detach() for tensor in tensors]))


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
