"""Members: networks that carry their own normalisation and show features at every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from training.models.bn_folding import Folded


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
    freeze_batchnorm: bool = False  # in training mode, too, BatchNorm uses its running statistics

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

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything in it, frozen BatchNorm excepted."""
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def modules_upto(self, layer: int) -> list[nn.Module]:
        """Return the modules that computing `layer` passes through."""
        return list(self.stages[:layer].modules())

    def frozen(self) -> Member:
        """Return a copy in evaluation mode, with BatchNorm folded, that threads may share.

        There is one copy, which every call brings up to date. Its convolutions and linear layers
        are in the dtype they are computed in, so that no pass has to cast their weights again.
        """
        kept = self._folded
        if kept is None or kept.copy._kind() != self._kind():
            self._folded = None  # not to be copied along
            self._folded = kept = Folded(self)
            for module in kept.copy.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(dtype=self.compute)
        return kept.refresh()

    def _kind(self) -> tuple[object, ...]:
        """Return what a frozen copy is made for."""
        return self.mean.device, self.mean.dtype, self.compute

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
