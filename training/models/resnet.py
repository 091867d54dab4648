"""ResNets for small images as lists of stages, and the names by which recipes know them."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dverge_serve.errors import UserError

LEAK = 0.1  # what a leaky ReLU lets through of the negative part
_NAME = re.compile(
    r"resnet(?P<depth>\d+)(?P<bottleneck>-bottleneck)?(?P<pad>-pad)?(?P<leaky>-leaky)?"
)


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

    def __init__(
        self, inside: int, outside: int, stride: int, active: nn.Module, kernel: int = 3
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.active = active

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return this part's output and the block's input."""
        active = self.active(features)
        return self.norm(self.conv(active)), active


class BlockMiddle(nn.Module):
    """The 3x3 convolution in the middle of a bottleneck block."""

    def __init__(self, within: int, stride: int, active: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(within, within, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(within)
        self.active = active

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return this part's output; the block's input passes by."""
        return self.norm(self.conv(self.active(features))), skip


class NarrowShortcut(nn.Conv2d):
    """A strided 1x1 convolution of fewer than 8 channels, computed in contiguous memory.

    On CPUs without AVX-512, torch's backward pass of such a convolution writes beyond its buffers
    if a tensor is channels-last (seen in torch 2.11 to 2.15, with oneDNN).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Convolve `[B, C, H, W]`; parameters and results are those of `Conv2d`."""
        weight = _contiguous(self.weight)
        found: Tensor = self._conv_forward(_contiguous(input), weight, self.bias)
        return found


def _contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor in torch's default layout; with one channel it may be in two at once."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


class PadShortcut(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, and channels of zeros at both ends.

    Option A of He et al. (2016, section 3.3).
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, self.missing = stride, outside - inside

    def forward(self, skip: Tensor) -> Tensor:
        """Return `[B, outside, H / stride, W / stride]` for `[B, inside, H, W]`."""
        first = self.missing // 2
        fewer = skip[:, :, :: self.stride, :: self.stride]
        return F.pad(fewer, (0, 0, 0, 0, first, self.missing - first))


class BlockExit(nn.Module):
    """Last part of a block: the residual sum.

    Args:
        inside, outside: channels of the block's input and output.
        stride: of the whole block, which the shortcut takes in one step.
        active: what stands before the convolution.
        within: channels that the last convolution reads; 0: as many as it gives.
        kernel: of that convolution.
        pad: the shortcut has no parameters, also where shapes change.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        stride: int,
        active: nn.Module,
        within: int = 0,
        kernel: int = 3,
        *,
        pad: bool = False,
    ) -> None:
        super().__init__()
        within = within or outside
        self.conv = nn.Conv2d(within, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if (stride != 1 or inside != outside) and pad:
            self.shortcut.append(PadShortcut(inside, outside, stride))
        elif stride != 1 or inside != outside:
            kind = NarrowShortcut if inside < 8 and stride != 1 else nn.Conv2d
            self.shortcut.append(kind(inside, outside, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outside))
        self.active = active

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum before its ReLU."""
        total = self.norm(self.conv(self.active(features))) + self.shortcut(skip)
        return total, total


class Head(nn.Module):
    """The last layer: global average pooling and the logits."""

    def __init__(self, width: int, classes: int, active: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        self.active = active

    def forward(self, features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]`."""
        logits = self.linear(self.active(features).mean((2, 3)))
        return logits, logits


def resnet_stages(architecture: str, channels: int, width: int, classes: int) -> list[nn.Module]:
    """Return the stages of the network that is called `architecture`.

    Args:
        architecture: `resnet<depth>` of basic blocks, depth 6n+2 (He et al. 2016, section 4.2), or
            `resnet<depth>-bottleneck`, depth 9n+2; `-pad` behind it makes shortcuts without
            parameters (option A there), `-leaky` behind that makes every ReLU leaky.
        channels: of the images.
        width: channels of the first third; each further third has twice as many.
        classes: how many logits.

    Raises:
        UserError: no such network.
    """
    known = _NAME.fullmatch(architecture)
    blocks, rest = divmod(int(known["depth"]) - 2, _parts(known)) if known else (0, 0)
    if not known or blocks < 1 or rest:
        raise UserError(
            f"unknown architecture '{architecture}'",
            "resnet<depth> with depth 6n+2, e.g. resnet8 or resnet20, resnet<9n+2>-bottleneck, "
            "either with -pad, -leaky or -pad-leaky behind it, or torchvision:<name>",
        )
    active = nn.LeakyReLU(LEAK) if known["leaky"] else nn.ReLU()
    pad = bool(known["pad"])
    stages: list[nn.Module] = [Stem(channels, width)]
    inside = width
    for third in range(3):
        within = width * 2**third
        outside = 4 * within if known["bottleneck"] else within
        for block in range(blocks):
            stride = 2 if third and not block else 1
            if known["bottleneck"]:
                stages += [
                    BlockEntry(inside, within, 1, active, kernel=1),
                    BlockMiddle(within, stride, active),
                    BlockExit(inside, outside, stride, active, within, kernel=1, pad=pad),
                ]
            else:
                stages += [
                    BlockEntry(inside, outside, stride, active),
                    BlockExit(inside, outside, stride, active, pad=pad),
                ]
            inside = outside
    return [*stages, Head(inside, classes, active)]


def deeper(architecture: str) -> str | None:
    """Return the name of the network with a block more in each third, None if it is not ours."""
    known = _NAME.fullmatch(architecture)
    if not known:
        return None
    start, end = known.span("depth")
    return f"{architecture[:start]}{int(known['depth']) + _parts(known)}{architecture[end:]}"


def family(architecture: str) -> list[str]:
    """Return the network and its relatives, which differ from it in one or two ways.

    They are the one with the other activation, the next deeper of both, and the one of the other
    kind of block, all with its kind of shortcut; of a network that is not ours only itself.
    """
    known = _NAME.fullmatch(architecture)
    if not known:
        return [architecture]
    bottleneck, leaky = known["bottleneck"] or "", known["leaky"] or ""
    blocks = (int(known["depth"]) - 2) // _parts(known)

    def named(blocks: int, bottleneck: str, leaky: str) -> str:
        depth = blocks * (9 if bottleneck else 6) + 2
        return f"resnet{depth}{bottleneck}{known['pad'] or ''}{leaky}"

    other = "" if leaky else "-leaky"
    return [
        architecture,
        named(blocks, bottleneck, other),
        named(blocks + 1, bottleneck, leaky),
        named(blocks + 1, bottleneck, other),
        named(blocks, "" if bottleneck else "-bottleneck", leaky),
    ]


def _parts(known: re.Match[str]) -> int:
    """Return how many convolutions a block in each third adds."""
    return 9 if known["bottleneck"] else 6
