"""BatchNorm folding: into the convolution before it, for networks in evaluation mode.

The same function in fewer operations: for attacks, for distillation and for export.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

Network = TypeVar("Network", bound=nn.Module)


def folded(network: Network) -> Network:
    """Return a copy in evaluation mode with every BatchNorm folded into the convolution before it.

    Its parameters need no gradients.
    """
    copy = deepcopy(network).eval()
    for conv, norm in _pairs(copy):
        before, after = copy.get_submodule(conv), copy.get_submodule(norm)
        assert isinstance(before, nn.Conv2d)
        assert isinstance(after, nn.BatchNorm2d)
        copy.set_submodule(conv, fuse_conv_bn_eval(before, after))
        copy.set_submodule(norm, nn.Identity())
    return copy.requires_grad_(False)


class Folded(Generic[Network]):
    """A folded copy of a network that goes on learning.

    Args:
        network: where the values come from.
    """

    def __init__(self, network: Network) -> None:
        self.copy = folded(network)
        self._convolutions: list[tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]] = []
        done: set[str] = set()
        for conv, norm in _pairs(network):
            modules = (
                network.get_submodule(conv),
                network.get_submodule(norm),
                self.copy.get_submodule(conv),
            )
            self._convolutions.append(modules)  # type: ignore[arg-type]
            done |= {conv, norm}
        ours = network.state_dict(keep_vars=True)
        self._others: list[tuple[Tensor, Tensor]] = [
            (ours[name], into)
            for name, into in self.copy.state_dict(keep_vars=True).items()
            if name.rpartition(".")[0] not in done
        ]

    @torch.no_grad()
    def refresh(self) -> Network:
        """Bring the copy up to the network's present weights and statistics, and return it."""
        for conv, norm, twin in self._convolutions:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert twin.bias is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            twin.weight.copy_(weight)
            twin.bias.copy_(bias)
        for value, into in self._others:
            into.copy_(value)
        return self.copy


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Return the names of every convolution and the BatchNorm registered right behind it."""
    found = []
    for prefix, parent in network.named_modules():
        for (name, module), (next_name, following) in pairwise(parent.named_children()):
            if isinstance(module, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                found.append((f"{prefix}.{name}".lstrip("."), f"{prefix}.{next_name}".lstrip(".")))
    return found
