"""Members: features at every layer, the architecture of the literature, starting weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dverge_serve.errors import UserError
from tests.training.methods import reference
from tests.training.networks import DEPTH, tiny_images, tiny_members
from training.config import Config, Data
from training.models.bn_folding import folded
from training.models.build import build_members
from training.models.ensemble import Ensemble


def config(architecture: str = "resnet8", **overrides: Any) -> Config:
    data = Data(mode=overrides.pop("mode", "RGB"))
    return Config(name="test", architecture=architecture, data=data, **overrides)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
@pytest.mark.parametrize("channels", [1, 3])
def test_features_equal_an_unrolled_forward_pass(channels: int, layer: int, training: bool) -> None:
    (member,) = tiny_members(1, channels=channels)
    network = reference.Network(member.state_dict())
    network.training = training
    images = tiny_images(3, channels=channels)
    with torch.no_grad():
        found = member.train(training)(images, layer)
        expected = network.features(images, layer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (layer == DEPTH) or bool((found < 0).any())  # before the ReLU


def test_without_a_layer_the_answer_is_the_logits() -> None:
    (member,) = tiny_members(1)
    member.eval()
    images = tiny_images(3)
    with torch.no_grad():
        assert torch.equal(member(images), member(images, member.depth))
        assert member(images).shape == (3, 4)


@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
def test_nothing_past_the_layer_is_computed(layer: int) -> None:
    (member,) = tiny_members(1)
    ran: list[str] = []
    for name, module in member.named_modules():
        if not list(module.children()) and not name.endswith(("shortcut", "active")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    member(tiny_images(2), layer)
    leaves = [
        name
        for name, module in member.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    assert sorted(ran) == sorted(name for name in leaves if int(name.split(".")[1]) < layer)


@pytest.mark.parametrize(("architecture", "depth"), [("resnet8", 8), ("resnet20", 20)])
def test_depth_counts_every_layer_of_the_name(architecture: str, depth: int) -> None:
    (member,) = tiny_members(1, architecture=architecture)
    assert member.depth == depth


def parameters_of_the_literature(depth: int, channels: int, width: int, classes: int) -> int:
    """Count a CIFAR ResNet's parameters by formula: 1x1 convolutions where the width changes."""
    blocks = (depth - 2) // 6
    total = 9 * channels * width + 2 * width
    inside = width
    for third in range(3):
        outside = width * 2**third
        for _ in range(blocks):
            total += 9 * inside * outside + 9 * outside * outside + 2 * 2 * outside
            if inside != outside:
                total += inside * outside + 2 * outside
            inside = outside
    return total + inside * classes + classes


@pytest.mark.parametrize(
    ("depth", "mode", "width", "classes"),
    [(20, "RGB", 16, 10), (8, "L", 4, 3), (14, "RGB", 8, 100), (32, "RGB", 16, 10)],
)
def test_parameters_are_those_of_the_literature(
    depth: int, mode: str, width: int, classes: int
) -> None:
    channels = 3 if mode == "RGB" else 1
    chosen = config(f"resnet{depth}", width=width, members=2, mode=mode)
    member = build_members(chosen, classes, [0.5] * channels, [0.5] * channels)[0]
    found = sum(parameter.numel() for parameter in member.parameters())
    assert found == parameters_of_the_literature(depth, channels, width, classes)
    if depth == 20:
        # He et al. report 0.27 M; identity shortcuts make 269,722, the convolutions 2,752 more.
        assert found == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64) == 272_474


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (28, 28), (33, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_size_from_eight_up(channels: int, size: tuple[int, int]) -> None:
    (member,) = tiny_members(1, channels=channels)
    images = torch.rand((2, channels, *size), dtype=torch.float64)
    assert member(images).shape == (2, 4)


def test_normalisation_is_inside_and_travels_with_the_weights() -> None:
    one, other = tiny_members(2, channels=3)
    expected = (tiny_images(2, channels=3) - one.mean) / one.std
    seen: list[Tensor] = []
    one.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    one(tiny_images(2, channels=3))
    torch.testing.assert_close(seen[0], expected)
    other.mean.zero_()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.mean, one.mean)


def test_starting_weights_follow_seed_and_member_and_leave_torchs_generator_alone() -> None:
    def weights(seed: int, count: int) -> list[Tensor]:
        members = build_members(config(seed=seed, members=count, width=8), 3, [0.5] * 3, [0.5] * 3)
        return [
            torch.cat([p.detach().flatten() for p in member.parameters()]) for member in members
        ]

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    two = weights(0, 2)
    assert torch.equal(torch.rand(4), expected)
    three, other = weights(0, 3), weights(1, 2)
    assert torch.equal(two[0], three[0])
    assert torch.equal(two[1], three[1])
    assert not torch.equal(two[0], two[1])
    assert not torch.equal(two[0], other[0])


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "resnet", "vgg16", "resnet20x", ""])
def test_an_unknown_architecture_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="unknown architecture") as caught:
        build_members(config(name), 10, [0.5] * 3, [0.5] * 3)
    assert caught.value.exit_code == 2
    assert "resnet20" in str(caught.value)


def test_mean_logits_is_the_mean_over_members() -> None:
    members = [member.eval() for member in tiny_members(3)]
    images = tiny_images(4)
    with torch.no_grad():
        expected = (members[0](images) + members[1](images) + members[2](images)) / 3
        torch.testing.assert_close(Ensemble(members)(images), expected)


@pytest.mark.parametrize("layer", [1, 4, 5, DEPTH])
def test_folding_batchnorm_away_changes_no_feature(layer: int) -> None:
    (member,) = tiny_members(1)
    copy, images = folded(member), tiny_images(3)
    member.eval()
    with torch.no_grad():
        torch.testing.assert_close(copy(images, layer), member(images, layer))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in member.modules())
    assert all(parameter.requires_grad for parameter in member.parameters())


def test_a_frozen_copy_holds_its_weights_in_the_dtype_it_computes_in() -> None:
    """The cast is the one that autocast makes at every pass: the same bits."""
    (member,) = tiny_members(1)
    member.float().eval()
    images, plain = tiny_images(3).float(), folded(member)
    for compute in (torch.bfloat16, None):
        member.compute = plain.compute = compute
        copy = member.frozen()
        weights = {each.weight.dtype for each in copy.modules() if isinstance(each, nn.Conv2d)}
        assert weights == {compute or torch.float32}
        assert copy.mean.dtype == torch.float32
        assert torch.equal(copy(images), plain(images))
