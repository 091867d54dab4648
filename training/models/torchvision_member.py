"""Any classifier of torchvision as a member, features taken at every eligible layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

from dverge_serve.errors import UserError, nearest
from training.models.dropout import name_dropout
from training.models.layer_graph import LayerGraph
from training.models.member import Member
from training.published_weights import PREFIX

AUXILIARY = ("googlenet", "inception_v3")


class TorchvisionMember(Member):
    """A torchvision classifier behind the interface of `Member`.

    Its layers are those of its graph, each before its activation; the last is the logits. Grayscale
    images are repeated to the three channels these networks take.
    """

    def __init__(
        self, network: nn.Module, graph: LayerGraph, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__([], mean, std)
        self.network, self._graph = network, graph

    @property
    def depth(self) -> int:
        """How many layers can be drawn, logits included."""
        return len(self._graph)

    def features(self, scaled: Tensor, layer: int | None) -> Tensor:
        """Return the features at `layer`, computing nothing past it; by default the logits."""
        scaled = scaled.expand(-1, 3, -1, -1) if scaled.shape[1] == 1 else scaled
        if layer is None or layer == self.depth:
            logits: Tensor = self.network(scaled)
            return logits
        return self._graph.features(self.network, scaled, layer)

    def modules_upto(self, layer: int) -> list[nn.Module]:
        """Return the modules that computing `layer` passes through."""
        if layer == self.depth:
            return list(self.network.modules())
        return self._graph.modules_upto(self.network, layer)


def build_torchvision(
    name: str,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    shape: tuple[int, int, int],
) -> TorchvisionMember:
    """Return `torchvision:<name>` with random weights from torch's global generator.

    Raises:
        UserError: torchvision has no such classifier, it cannot be cut into layers, or it does not
            take images of `shape`: channels, height, width.
    """
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(
            f"unknown architecture '{PREFIX}{name}'", next_step=nearest(name, known)[:300]
        )
    # The one classifier at the end is what is trained; two networks have more of them.
    single = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    network = models.get_model(name, weights=None, num_classes=classes, **single)
    open_blocks(network)
    name_dropout(network)
    try:
        graph = LayerGraph(network.eval())  # without the functional dropout of some, at rate 0
    except Exception as error:  # torch.fx fails in many ways on networks it cannot trace
        raise UserError(
            f"'{PREFIX}{name}' cannot be cut into layers ({type(error).__name__})",
            "a network that torch.fx can trace",
        ) from error
    member = TorchvisionMember(network, graph, mean, std)
    try:
        with torch.no_grad():
            member.eval()(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError) as error:  # pooled to nothing, or made for one size
        size = "x".join(map(str, shape[1:]))
        raise UserError(
            f"'{PREFIX}{name}' does not take images of {size}",
            "a size it was made for",
            "set data.crop, e.g. `overrides` 'data.crop=[224,224]'",
        ) from error
    return member.train()


def open_blocks(network: nn.Module) -> None:
    """Make torchvision's convolution blocks plain sequences, which the tracer looks into.

    Their own class is a leaf to it, and would show features only after the activation.
    """
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            ours = type(block).__module__.startswith("torchvision.ops")
            if ours and isinstance(block, nn.Sequential):
                setattr(parent, name, nn.Sequential(OrderedDict(block.named_children())))
