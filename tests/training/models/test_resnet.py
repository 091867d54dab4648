"""The names of networks for small images: which they are, which are refused, which is deeper."""

from __future__ import annotations

import pytest
import torch

from dverge_serve.errors import UserError
from training.models.member import Member
from training.models.resnet import LEAK, Head, PadShortcut, deeper, resnet_stages


def convolutions(architecture: str) -> int:
    """Return how many convolutions a 3-channel network has, those of shortcuts left out."""
    stages = resnet_stages(architecture, 3, 4, 10)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    return names.count("conv.weight")


@pytest.mark.parametrize(
    ("architecture", "other"),
    [
        ("resnet8", "resnet14"),
        ("resnet20-leaky", "resnet26-leaky"),
        ("resnet11-bottleneck", "resnet20-bottleneck"),
        ("resnet29-bottleneck-leaky", "resnet38-bottleneck-leaky"),
        ("resnet20-pad-leaky", "resnet26-pad-leaky"),
    ],
)
def test_a_name_counts_the_layers(architecture: str, other: str) -> None:
    depth = int("".join(filter(str.isdigit, architecture)))
    assert convolutions(architecture) + 1 == depth  # and the linear layer
    assert deeper(architecture) == other
    assert convolutions(other) > convolutions(architecture)


@pytest.mark.parametrize(
    "architecture",
    ["resnet9", "resnet2", "resnet8-bottleneck", "resnet20-leaky-pad", "resnet", "vgg16"],
)
def test_other_names_are_refused_with_what_there_is(architecture: str) -> None:
    with pytest.raises(UserError, match=r"6n\+2.*9n\+2.*-leaky"):
        resnet_stages(architecture, 3, 4, 10)


@pytest.mark.parametrize("kind", ["", "-bottleneck"])
def test_shortcuts_by_padding_have_no_parameters(kind: str) -> None:
    depth = 11 if kind else 8
    plain, pad = (
        {name for stage in stages for name, _ in stage.named_parameters()}
        for stages in (
            resnet_stages(f"resnet{depth}{kind}", 3, 3, 10),  # 3 channels: an odd number to add
            resnet_stages(f"resnet{depth}{kind}-pad", 3, 3, 10),
        )
    )
    assert plain - pad == {name for name in plain if "shortcut" in name}
    shortcut = PadShortcut(3, 6, 2)
    images = torch.rand(2, 3, 8, 8)
    found = shortcut(images)
    assert torch.equal(found[:, 1:4], images[:, :, ::2, ::2])
    assert not found[:, [0, 4, 5]].any()


def test_only_our_networks_have_a_deeper_one() -> None:
    assert deeper("torchvision:resnet18") is None


def test_leaky_members_let_the_negative_part_through() -> None:
    plain, leaky = (
        Member(resnet_stages(name, 3, 4, 10), [0.5] * 3, [0.25] * 3).eval()
        for name in ("resnet8", "resnet8-leaky")
    )
    leaky.load_state_dict(plain.state_dict())  # the same parameters by the same names
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = plain(images, plain.depth - 1)
    assert torch.equal(plain.stages[-1](before, before)[0], plain(images))
    features = torch.full((1, 16, 2, 2), -1.0)
    head = leaky.stages[-1]
    assert isinstance(head, Head)
    expected = head.linear(torch.full((1, 16), -LEAK))
    torch.testing.assert_close(head(features, features)[0], expected)
    assert not torch.equal(plain(images), leaky(images))
