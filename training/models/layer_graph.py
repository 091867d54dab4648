"""The layers of a network that torch.fx traced, and the computation up to each of them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, fx, nn

from training.models.dropout import NamedDropout

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
SUMS = (operator.add, operator.iadd, torch.add)
CLASSES = [each for each in vars(torchvision.ops).values() if isinstance(each, type)]
LEAVES: tuple[type, ...] = (NamedDropout, *(c for c in CLASSES if issubclass(c, nn.Module)))


class LayerGraph:
    """The traced graph of a network, which finds modules by name: copies of a network share it.

    Eligible layers, in the order they are computed: the output of every convolution and linear
    layer (of the normalisation right behind it, where there is one) and every residual sum.

    Tracing disturbs every network of the process meanwhile; what is done later does not.

    Args:
        network: is traced here.

    Raises:
        Exception: of any kind, for a network that torch.fx cannot trace.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers: list[fx.Node] = []
        self._parts: dict[int, tuple[Callable[..., Tensor], list[str]]] = {}
        for node in _Tracer((torchvision.ops,)).trace(network).nodes:
            called = node.op == "call_module"
            module = network.get_submodule(node.target) if called else None
            if isinstance(module, NORMS) and self._layers[-1:] == [node.prev]:
                self._layers[-1] = node  # convolution and its normalisation are one layer
            elif isinstance(module, nn.Conv2d | nn.Linear) or node.target in SUMS:
                self._layers.append(node)

    def __len__(self) -> int:
        return len(self._layers)

    def __deepcopy__(self, memo: object) -> LayerGraph:
        return self

    def features(self, network: nn.Module, images: Tensor, layer: int) -> Tensor:
        """Return what a copy of the network computes at `layer` (from 1), and nothing past it."""
        return self._upto(network, layer)[0](network, images)

    def modules_upto(self, network: nn.Module, layer: int) -> list[nn.Module]:
        """Return the modules of a copy of the network that computing `layer` passes through."""
        called = [network.get_submodule(name) for name in self._upto(network, layer)[1]]
        return list(dict.fromkeys(each for module in called for each in module.modules()))

    def _upto(self, network: nn.Module, layer: int) -> tuple[Callable[..., Tensor], list[str]]:
        """Return the function of a network and images, and the names of the modules it calls."""
        if layer not in self._parts:
            last = self._layers[layer - 1]
            needed = {last}
            for node in reversed(last.graph.nodes):
                needed.update(node.all_input_nodes if node in needed else [])
            part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
            for node in last.graph.nodes:
                if node in needed:
                    copies[node] = part.node_copy(node, copies.__getitem__)
            part.output(copies[last])
            names = [str(node.target) for node in part.find_nodes(op="call_module")]
            self._parts[layer] = type(fx.GraphModule(network, part)).forward, names
        return self._parts[layer]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)
