"""The copies of networks that attacks take gradients from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.models.torchvision_member import build_torchvision
from training.pgd import cross_entropy, gradient
from verification import gradients
from verification.gradients import ready

CPU, SHAPE = torch.device("cpu"), (3, 32, 32)


@pytest.mark.parametrize(("name", "dtype"), [("resnet18", torch.bfloat16), ("mobilenet_v2", None)])
def test_networks_with_depthwise_convolutions_are_not_lowered_on_a_cpu(
    name: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def able(precision: str, device: torch.device) -> torch.dtype | None:
        return None if precision == "fp32" else torch.bfloat16

    monkeypatch.setattr(gradients, "autocast_dtype", able)
    member = build_torchvision(name, 3, [0.5] * 3, [0.5] * 3, SHAPE)
    assert ready(member, CPU, lowered=True).compute is dtype
    assert ready(member, CPU).compute is None


def test_activations_that_would_copy_their_input_do_not_work_in_place() -> None:
    member = build_torchvision("mobilenet_v2", 3, [0.5] * 3, [0.5] * 3, SHAPE).eval()
    copy = ready(member, CPU)
    assert not any(each.inplace for each in copy.modules() if isinstance(each, nn.ReLU6))
    assert any(each.inplace for each in member.modules() if isinstance(each, nn.ReLU6))
    images, labels = torch.rand(2, *SHAPE), torch.tensor([0, 2])
    ours, theirs = (gradient(cross_entropy(each, labels), images) for each in (copy, member))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
