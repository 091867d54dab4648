"""BatchNorm over a shared batch, in a group of one; `test_distributed` has larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.parallel.sync_batchnorm import SharedBatchNorm2d, share_statistics


def test_a_pass_is_batchnorms_with_one_exchange_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is a thousand deviations from zero, where a mean of squares would not do."""
    exchanged: list[tuple[int, ...]] = []

    def all_reduce(tensor: Tensor, group: Any) -> None:
        exchanged.append(tuple(tensor.shape))

    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    plain, shared = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    share_statistics(shared, None)  # type: ignore[arg-type]
    assert isinstance(shared[0], SharedBatchNorm2d)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 1000
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for network in (plain, shared):
        images = x.clone().requires_grad_()
        found = network(images)
        (found * weights).sum().backward()
        gradients.append((found.detach(), images.grad))
    assert exchanged == [(1, 2, 3)] * 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    for one, other in zip(plain.buffers(), shared.buffers(), strict=True):
        torch.testing.assert_close(one, other)
