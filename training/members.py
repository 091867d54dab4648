"""Members: networks that carry their own normalisation and show features at every layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dverge_serve.errors import UserError
from training.config import Config
from training.folding import Folded
from training.seeds import derive


class Member(nn.Module):
    """A classifier as a list of stages; the features after stage `l` are layer `l`'s output.

    Layers count from 1 to `depth`; features are taken before the ReLU, and layer `depth` is the
    logits (paper, section 3.1). Each stage maps `(features, skip)` to the next pair.

    Args:
        stages: the network.
        mean, std: per channel, for images in `[0,1]`; the subtraction lives inside the model.
    """

    mean: Tensor
    std: Tensor
    compute: torch.dtype | None = None  # autocast to this; results are float32 all the same

    def __init__(
        self, stages: Sequence[nn.Module], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self._folded: Folded[Member] | None = None

    @property
    def depth(self) -> int:
        """How many layers can be drawn, logits included."""
        return len(self.stages)

    def layer_at(self, layer: int, deepest: int) -> int:
        """Return the layer at the same share of this member's depth as `layer` is of `deepest`."""
        return -(-layer * self.depth // deepest)

    def modules_upto(self, layer: int) -> list[nn.Module]:
        """Return the modules that computing `layer` passes through."""
        return list(self.stages[:layer].modules())

    def frozen(self, layer: int) -> Member:
        """Return this member as it is now in evaluation mode, for threads to share: a look at
        `layer` changes nothing in it.

        Every call brings the one copy with BatchNorm folded up to date.
        """
        kept = self._folded
        if kept is None or (kept.copy.mean.device, kept.copy.mean.dtype) != (
            self.mean.device,
            self.mean.dtype,
        ):
            self._folded = None  # not to be copied along
            self._folded = kept = Folded(self)
        copy = kept.refresh()
        copy.compute = self.compute
        return copy

    def forward(self, images: Tensor, layer: int | None = None) -> Tensor:
        """Return the features at `layer`, computing nothing past it; by default the logits.

        Args:
            images: float `[batch, channels, height, width]` in `[0,1]`.
            layer: 1..depth.
        """
        if self.compute is None:
            return self.features((images - self.mean) / self.std, layer)
        with torch.autocast(images.device.type, self.compute):
            return self.features((images - self.mean) / self.std, layer).float()

    def features(self, scaled: Tensor, layer: int | None) -> Tensor:
        """Return the features at `layer` for images that are normalised already."""
        features, skip = scaled, scaled
        for stage in self.stages[:layer]:
            features, skip = stage(features, skip)
        return features


class Stem(nn.Module):
    """Layer 1: the first convolution and its BatchNorm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features; the skip is not used yet."""
        return self.norm(self.conv(images)), skip


class BlockEntry(nn.Module):
    """First part of a block: its output, and the input that the shortcut takes past it."""

    def __init__(self, inside: int, outside: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return this part's output and the block's input."""
        active = F.relu(features)
        return self.norm(self.conv(active)), active


class BlockMiddle(nn.Module):
    """The 3x3 convolution in the middle of a bottleneck block."""

    def __init__(self, within: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(within, within, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(within)

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return this part's output; the block's input passes by."""
        return self.norm(self.conv(F.relu(features))), skip


class BlockExit(nn.Module):
    """Last part of a block: the residual sum.

    Args:
        inside, outside: channels of the block's input and output.
        stride: of the whole block, which the shortcut takes in one step.
        within: channels that the last convolution reads; 0: as many as it gives.
        kernel: of that convolution.
    """

    def __init__(
        self, inside: int, outside: int, stride: int, within: int = 0, kernel: int = 3
    ) -> None:
        super().__init__()
        within = within or outside
        self.conv = nn.Conv2d(within, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut.append(nn.Conv2d(inside, outside, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outside))

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum before its ReLU."""
        total = self.norm(self.conv(F.relu(features))) + self.shortcut(skip)
        return total, total


class Head(nn.Module):
    """The last layer: global average pooling and the logits."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]`."""
        logits = self.linear(F.relu(features).mean((2, 3)))
        return logits, logits


def cifar_resnet_stages(depth: int, channels: int, width: int, classes: int) -> list[nn.Module]:
    """Return the CIFAR ResNet of He et al. (2016), section 4.2: depth 6n+2, thirds w, 2w, 4w."""
    stages: list[nn.Module] = [Stem(channels, width)]
    inside = width
    for third in range(3):
        outside = width * 2**third
        for block in range((depth - 2) // 6):
            stride = 2 if third and not block else 1
            stages += [BlockEntry(inside, outside, stride), BlockExit(inside, outside, stride)]
            inside = outside
    return [*stages, Head(inside, classes)]


def bottleneck_resnet_stages(
    blocks: int, channels: int, width: int, classes: int
) -> list[nn.Module]:
    """Return the CIFAR ResNet of bottleneck blocks, depth 9n+2 (the blocks of He et al. 2016).

    Each third has `blocks` blocks of 1x1, 3x3 and 1x1 convolutions and gives four times the
    channels that its blocks have within.
    """
    stages: list[nn.Module] = [Stem(channels, width)]
    inside = width
    for third in range(3):
        within, outside = width * 2**third, 4 * width * 2**third
        for block in range(blocks):
            stride = 2 if third and not block else 1
            stages += [
                BlockEntry(inside, within, 1, kernel=1),
                BlockMiddle(within, stride),
                BlockExit(inside, outside, stride, within, kernel=1),
            ]
            inside = outside
    return [*stages, Head(inside, classes)]


def build(
    config: Config,
    architecture: str,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Member:
    """Return one member with weights drawn from torch's global generator.

    Raises:
        UserError: an unknown architecture.
    """
    if architecture.startswith("torchvision:"):
        from training.zoo import build_torchvision

        shape = config.data.preprocess.shape
        return build_torchvision(architecture.partition(":")[2], classes, mean, std, shape)
    match = re.fullmatch(r"resnet(\d+)", architecture)
    depth = int(match[1]) if match else 0
    if depth < 8 or (depth - 2) % 6:
        raise UserError(
            f"unknown architecture '{architecture}'",
            "resnet<depth> with depth 6n+2, e.g. resnet8 or resnet20, or torchvision:<name>",
        )
    channels = config.data.preprocess.shape[0]
    member = Member(cifar_resnet_stages(depth, channels, config.width, classes), mean, std)
    for module in member.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return member


def build_members(
    config: Config,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    draw: str = "weights",
) -> list[Member]:
    """Return the ensemble's members, each with starting weights of its own seed.

    Args:
        config: architecture, or one for each member.
        classes: how many logits.
        mean, std: per channel, for images in `[0,1]`.
        draw: names the random draw; another name gives other weights.
    """
    members = []
    for index, architecture in enumerate(config.architectures):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.seed, draw, index))
            members.append(build(config, architecture, classes, mean, std))
    return members


def mean_logits(members: Sequence[nn.Module], images: Tensor) -> Tensor:
    """Return the ensemble's answer: the mean of its members' logits, `[batch, classes]`."""
    return torch.stack([member(images) for member in members]).mean(0)
