"""Dropout with seeded draws: a resumed run drops what it would have dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from training.seeds import derive


class NamedDropout(nn.Dropout):
    """Dropout of single values, or of whole rows of a batch, from a generator of its own.

    torch's own draws from one generator for all, in whatever order threads reach it.

    Args:
        p: the share that is dropped.
        rows: drop whole rows of the batch (stochastic depth).
    """

    def __init__(self, p: float, *, rows: bool = False) -> None:
        super().__init__(p)
        self.rows = rows
        self.seed, self.passes = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as it is in evaluation mode; in training mode a part of it, scaled up."""
        if not self.training or self.p == 0:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1) if self.rows else x.shape
        if x.is_cuda:  # its generator can be recorded in a graph, others cannot
            kept = torch.rand(shape, device=x.device) >= self.p
        else:
            draw = torch.Generator().manual_seed(derive(self.seed, self.passes))
            kept = torch.rand(shape, generator=draw) >= self.p
            self.passes += 1
        return x * kept.to(x.dtype) / (1 - self.p)


def name_dropout(network: nn.Module) -> None:
    """Put `NamedDropout` in place of every dropout layer of `network`."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, StochasticDepth):
                setattr(parent, name, NamedDropout(layer.p, rows=layer.mode == "row"))
            elif type(layer) is nn.Dropout:
                setattr(parent, name, NamedDropout(layer.p))


def seed_dropout(members: Sequence[nn.Module], *seed_path: int | str) -> None:
    """Seed the members' dropout: what is dropped from now on depends on `seed_path` alone."""
    for index, member in enumerate(members):
        for position, layer in enumerate(member.modules()):
            if isinstance(layer, NamedDropout):
                layer.seed, layer.passes = derive(*seed_path, index, position), 0
    if torch.cuda.is_available():
        torch.cuda.manual_seed(derive(*seed_path))
