"""Any classifier of torchvision as a member, features taken at every eligible layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from dverge_serve.errors import UserError, nearest
from training.models.dropout import NamedDropout, name_dropout
from training.models.member import Member
from training.published_weights import PREFIX

AUXILIARY = ("googlenet", "inception_v3")
TRACER = {"leaf_modules": [NamedDropout]}  # modules that it must not look into
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class TorchvisionMember(Member):
    """A torchvision classifier behind the interface of `Member`.

    Eligible layers, in the order they are computed: the output of every convolution and linear
    layer (of the normalisation right behind it, where there is one) and every residual sum, each
    before its activation; the last is the logits. Grayscale images are repeated to the three
    channels these networks take.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__([], mean, std)
        self.network = network
        self._layers = tuple(layers)
        self._upto: dict[int, nn.Module] = {}

    @property
    def depth(self) -> int:
        """How many layers can be drawn, logits included."""
        return len(self._layers)

    def features(self, scaled: Tensor, layer: int | None) -> Tensor:
        """Return the features at `layer`, computing nothing past it; by default the logits."""
        scaled = scaled.expand(-1, 3, -1, -1) if scaled.shape[1] == 1 else scaled
        if layer is None or layer == self.depth:
            logits: Tensor = self.network(scaled)
            return logits
        found: Tensor = self._network_upto(layer)(scaled)["features"]
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network and of what was cut from it."""
        for part in self._upto.values():
            part.train(mode)
        return super().train(mode)  # last: frozen BatchNorm is in the parts, too

    def modules_upto(self, layer: int) -> list[nn.Module]:
        """Return the modules that computing `layer` passes through."""
        whole = layer == self.depth
        return list((self.network if whole else self._network_upto(layer)).modules())

    @property
    def frozen_apart(self) -> bool:
        """Whether `frozen` returns a copy."""
        return False

    def frozen(self, layer: int) -> TorchvisionMember:
        """Return this member in evaluation mode, cut at `layer` before any thread asks for it.

        Not a folded copy: cutting one into layers would cost more than it saves.
        """
        self.modules_upto(layer)
        return self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchvisionMember:
        copy = TorchvisionMember(deepcopy(self.network, memo), self._layers, [0.0], [1.0])
        copy.mean, copy.std = self.mean.clone(), self.std.clone()
        copy.compute, copy.freeze_batchnorm = self.compute, self.freeze_batchnorm
        return copy.train(self.training)

    def _network_upto(self, layer: int) -> nn.Module:
        if layer not in self._upto:
            wanted = {self._layers[layer - 1]: "features"}
            part = create_feature_extractor(self.network, wanted, tracer_kwargs=TRACER)
            # Held beside the network, not inside it: they share every parameter.
            self._upto[layer] = part
            self.train(self.training)
        return self._upto[layer]


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
        layers = eligible_layers(network)
    except Exception as error:  # torch.fx fails in many ways on networks it cannot trace
        raise UserError(
            f"'{PREFIX}{name}' cannot be cut into layers ({type(error).__name__})",
            "a network that torchvision's feature extraction can trace",
        ) from error
    member = TorchvisionMember(network, layers, mean, std)
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


def eligible_layers(network: nn.Module) -> list[str]:
    """Return the names of the graph nodes whose output DVERGE may distil, in order."""
    names, _ = get_graph_node_names(network, tracer_kwargs=TRACER)
    modules = dict(network.named_modules())
    eligible: list[str] = []
    for before, name in pairwise(["", *names]):
        module = modules.get(name)
        # torch.fx calls residual sums add, add_1, ...
        is_sum = name.rpartition(".")[2].partition("_")[0] in ("add", "iadd")
        if isinstance(module, NORMS) and eligible and eligible[-1] == before:
            eligible[-1] = name  # convolution and its normalisation are one layer
        elif isinstance(module, nn.Conv2d | nn.Linear) or is_sum:
            eligible.append(name)
    return eligible
