"""BatchNorm over a batch that several processes share.

Not torch's SyncBatchNorm: that needs a GPU, has no second derivative (which GAL takes), and is no
BatchNorm2d, so that what looks for one, to fold it or to read its statistics, would pass it over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that in training normalises by the statistics of the whole batch.

    Every process holds an equal share `[B / shares, C, H, W]`. In evaluation it is an ordinary
    BatchNorm; parameters and buffers have the same names.
    """

    # A plain function: members are copied, and a process group cannot be.
    of_every_share: Callable[[Tensor], Tensor]
    shares: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise `[B / shares, C, H, W]`, in training by all shares."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = input.float() if input.dtype is torch.bfloat16 else input
        own = torch.var_mean(values, (0, 2, 3), correction=0)
        variances, means = self.of_every_share(torch.stack(own)).unbind(1)  # [shares, C] each
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        count = self.shares * input.numel() // input.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        centred = values - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def share_statistics(network: nn.Module, group: dist.ProcessGroup) -> None:
    """Turn every BatchNorm2d of `network` into one over the batch that `group` shares."""
    shares, share = dist.get_world_size(group), dist.get_rank(group)

    def of_every_share(own: Tensor) -> Tensor:
        """Return every process's tensor, `[shares, ...]`, in one exchange."""
        alone = F.pad(own[None], (0, 0) * own.dim() + (share, shares - 1 - share))
        total: Tensor = _Sum.apply(alone, group)
        return total

    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d
            module.of_every_share, module.shares = of_every_share, shares  # type: ignore[assignment]


class _Sum(torch.autograd.Function):
    """The sum over a group's processes; so is its gradient, and that one's."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0].contiguous(), context.group), None
