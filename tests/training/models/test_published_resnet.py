"""Published files of CIFAR ResNets: recognised, read as they are, refused where they lie."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dverge_serve.errors import UserError
from tests.training.networks import tiny_members
from tests.training.published import nets, table, wrapped
from training.config import Config
from training.models.build import build_members
from training.models.member import Member
from training.models.pretrained import Start
from training.models.published_resnet import NORMALISATION, PublishedResNet
from training.models.state_dict import members_tensors, network_sha256
from training.models.weights_file import WeightsFile

IMAGENET = NORMALISATION["linear"]


def members(path: Path) -> list[Member]:
    return [
        PublishedResNet.recognise(each, path).member(each, path)
        for each in WeightsFile.read(path).networks
    ]


def scaled(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    both = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
    return (images - both[0]) / both[1]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_shortcuts_without_parameters_compute_what_the_repository_does(
    blocks: int, form: str, tmp_path: Path
) -> None:
    (net,) = nets(1, blocks=blocks, pad=True)
    path = tmp_path / "net.th"
    if form == "pickle":
        torch.save(wrapped(net), path, _use_new_zipfile_serialization=False)
    else:
        save_file(net.state_dict(), path)
    (network,) = WeightsFile.read(path).networks
    found = PublishedResNet.recognise(network, path)
    assert (found.architecture, found.width, found.classes) == (
        f"resnet{6 * blocks + 2}-pad",
        4,
        10,
    )
    (member,) = members(path)
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(member(images), net(scaled(images, *IMAGENET)), rtol=1e-4, atol=1e-5)


def test_a_runs_members_are_recognised_by_our_own_names(tmp_path: Path) -> None:
    for architecture in ("resnet8", "resnet14-pad", "resnet11-bottleneck"):
        made = [each.float().eval() for each in tiny_members(2, architecture=architecture)]
        save_file(members_tensors(made), tmp_path / "members.safetensors")
        (first, _) = WeightsFile.read(tmp_path / "members.safetensors").networks
        assert PublishedResNet.recognise(first, "a file").architecture == architecture
        again = members(tmp_path / "members.safetensors")
        assert [network_sha256(each) for each in again] == [network_sha256(each) for each in made]
        assert network_sha256(made[0]) != network_sha256(made[1])


def started(path: Path, **settings: object) -> tuple[Start, list[Member]]:
    config = Config.from_json({"name": "t", "width": 4, "start": str(path)} | settings, "here")
    start = Start.read(config)
    assert start is not None
    made = build_members(config, 10, [0.9] * 3, [0.8] * 3)
    start.put_into(made)
    return start, made


def test_members_start_from_published_ones_with_their_normalisation(tmp_path: Path) -> None:
    made = nets(3)
    torch.save(table(made), tmp_path / "three.pth", _use_new_zipfile_serialization=False)
    start, own = started(tmp_path / "three.pth", architecture="resnet8")
    assert start.complete(own)
    images = torch.rand(2, 3, 16, 16)
    for member, net in zip(own, made, strict=True):
        assert member.mean.flatten().tolist() == pytest.approx([0.3] * 3)
        expected = net(scaled(images, (0.3,) * 3, (0.5,) * 3))
        torch.testing.assert_close(member.eval()(images), expected, rtol=1e-4, atol=1e-5)
    (net,) = nets(1, pad=True)
    torch.save(wrapped(net), tmp_path / "one.th")
    _, own = started(tmp_path / "one.th", architecture="resnet8-pad", members=1, method="standard")
    assert own[0].mean.flatten().tolist() == pytest.approx(list(IMAGENET[0]))


def test_another_architecture_is_refused_with_the_one_that_fits(tmp_path: Path) -> None:
    torch.save(wrapped(nets(1, pad=True)[0]), tmp_path / "one.th")
    with pytest.raises(
        UserError, match="holds a resnet8-pad of width 4, member 0 is a resnet20 of"
    ):
        started(tmp_path / "one.th", architecture="resnet20")
    with pytest.raises(UserError, match="use `architecture` resnet8-pad and `width` 4"):
        started(tmp_path / "one.th", architecture="resnet8")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        members(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(10**9, 3, 3, 3)}, path)
    assert "claims more weights than it has bytes" in refusal(path)
    torch.save({"conv1.weight": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "is compressed" in refusal(path)


def test_a_wide_first_layer_alone_builds_no_wide_network(tmp_path: Path) -> None:
    (net,) = nets(1)
    wide = net.state_dict() | {"conv1.weight": torch.zeros(20_000, 3, 3, 3)}  # whole: 200 GB
    torch.save(wide, tmp_path / "wide.pth")
    assert "has shape [4], in the network [20000]" in refusal(tmp_path / "wide.pth")


def test_what_is_no_such_network_is_named(tmp_path: Path) -> None:
    (net,) = nets(1)
    path = tmp_path / "odd.pth"
    torch.save({"net": net.state_dict()}, path)
    assert "odd.pth holds net; expected" in refusal(path)
    torch.save(net.state_dict() | {"layer4.0.conv1.weight": torch.zeros(1)}, path)
    assert "expected a CIFAR ResNet" in refusal(path)
    torch.save(net.state_dict() | {"module.conv1.weight": torch.zeros(1)}, path)
    assert "twice, with and without a wrapper" in refusal(path)
    normaliser = {"normalizer.mean": torch.zeros(2), "normalizer.std": torch.ones(2)}
    torch.save(net.state_dict() | normaliser, path)
    assert "reads 3 channels and normalises 2" in refusal(path)
