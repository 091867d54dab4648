"""Networks as others publish them: a second implementation, and files of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Table = dict[str, Any]


class PublishedNet(nn.Module):
    """A network with the published names, written from the architecture's description.

    Args:
        pad: with shortcuts without parameters, and the last layer called `linear`, as in another
            repository.
    """

    def __init__(
        self,
        blocks: int,
        width: int,
        classes: int,
        *,
        bottleneck: bool = False,
        pad: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.expansion, self.pad = (4 if bottleneck else 1), pad
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inside = width
        for third in range(3):
            layer = nn.ModuleList()
            for number in range(blocks):
                within = width * 2**third
                stride = 2 if third and not number else 1
                layer.append(self._block(inside, within, stride, bottleneck))
                inside = within * self.expansion
            setattr(self, f"layer{third + 1}", layer)
        self.last = "linear" if pad else "fc"
        setattr(self, self.last, nn.Linear(inside, classes))

    def _block(self, inside: int, within: int, stride: int, bottleneck: bool) -> nn.Module:
        outside = within * self.expansion
        block = nn.Module()
        shapes = (
            [(inside, within, 1, 1), (within, within, 3, stride), (within, outside, 1, 1)]
            if bottleneck
            else [(inside, within, 3, stride), (within, outside, 3, 1)]
        )
        for at, (one, other, kernel, step) in enumerate(shapes, 1):
            setattr(
                block, f"conv{at}", nn.Conv2d(one, other, kernel, step, kernel // 2, bias=False)
            )
            setattr(block, f"bn{at}", nn.BatchNorm2d(other))
        if (stride != 1 or inside != outside) and not self.pad:
            short = nn.Conv2d(inside, outside, 1, stride, bias=False)
            block.downsample = nn.Sequential(short, nn.BatchNorm2d(outside))
        return block

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for third in (1, 2, 3):
            for block in getattr(self, f"layer{third}"):
                parts = 3 if self.expansion == 4 else 2
                y = x
                for at in range(1, parts + 1):
                    y = getattr(block, f"bn{at}")(getattr(block, f"conv{at}")(y))
                    y = F.relu(y) if at < parts else y
                x = F.relu(y + self._shortcut(block, x, y.shape[1]))
        return getattr(self, self.last)(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]

    @staticmethod
    def _shortcut(block: nn.Module, x: Tensor, outside: int) -> Tensor:
        if hasattr(block, "downsample"):
            return block.downsample(x)  # type: ignore[no-any-return, operator]
        if x.shape[1] == outside:
            return x
        zeros = torch.zeros_like(x[:, : (outside - x.shape[1]) // 2, ::2, ::2])
        return torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)


def nets(count: int, *, blocks: int = 1, classes: int = 10, **kind: Any) -> list[PublishedNet]:
    torch.manual_seed(count)
    made = []
    for _ in range(count):
        net = PublishedNet(blocks, 4, classes, **kind)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        made.append(net.eval())
    return made


def table(made: list[PublishedNet], key: str = "model", mean: float = 0.3) -> Table:
    return {
        f"{key}{index}": {
            **{f"model.{name}": value for name, value in net.state_dict().items()},
            "normalizer.mean": torch.full((3,), mean),
            "normalizer.std": torch.full((3,), 0.5),
        }
        for index, net in enumerate(made)
    }


def wrapped(net: PublishedNet) -> Table:
    """Return a network as a repository with `DataParallel` saves it."""
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    return {"best_prec1": 91.25, "state_dict": {k: v for k, v in state.items() if k not in counts}}
