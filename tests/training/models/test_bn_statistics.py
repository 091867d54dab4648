"""The effect of a pass on BatchNorm, repeated without the pass, in a few operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.networks import DEPTH, tiny_images, tiny_members
from training.models.bn_statistics import features_and_statistics


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations: on a GPU each is a launch."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("momenta", "operations"), [((0.1,), 3), ((0.1, 0.01), 5)])
def test_a_repeated_pass_is_a_pass_in_operations_for_all_norms_at_once(
    momenta: tuple[float, ...], operations: int
) -> None:
    (member,) = tiny_members(1)
    norms = [module for module in member.modules() if isinstance(module, nn.BatchNorm2d)]
    for number, norm in enumerate(norms):
        norm.momentum = momenta[number % len(momenta)]
    literal, images = copy.deepcopy(member).train(), tiny_images(5)
    with torch.no_grad():
        features, again = features_and_statistics(member.train(), images, DEPTH)
        assert torch.equal(features, literal(images, DEPTH))
        literal(images, DEPTH)
    for _ in range(2):
        with Counted() as counted:  # type: ignore[no-untyped-call]
            again()
        assert counted.operations == operations
    for name, tensor in literal.state_dict().items():
        torch.testing.assert_close(member.state_dict()[name], tensor, rtol=0, atol=1e-12)
