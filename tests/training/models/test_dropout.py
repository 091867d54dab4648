"""Dropout in torchvision's networks: its law, and that runs draw it anew in the same way."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from tests.training.networks import tiny_config
from tests.training.stopping import stopped_at_its_first_state
from training.models.dropout import NamedDropout, name_dropout, seed_dropout
from training.models.torchvision_member import build_torchvision
from training.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [False, True])
def test_a_share_is_dropped_and_the_rest_scaled_up(rows: bool) -> None:
    layer = NamedDropout(0.3, rows=rows)
    x = torch.rand(4000, 3, 2, 2) + 1
    found = layer(x)
    kept = found != 0
    torch.testing.assert_close(found[kept], (x / 0.7)[kept])
    assert 0.67 < float(kept.float().mean()) < 0.73
    whole = kept.flatten(1).float().mean(1)
    assert bool(((whole == 0) | (whole == 1)).all()) == rows
    assert torch.equal(layer.eval()(x), x)


def test_draws_follow_their_names_and_nothing_else() -> None:
    x = torch.ones(50, 4)

    def drawn(*names: int | str) -> list[torch.Tensor]:
        members = [nn.Sequential(NamedDropout(0.5), NamedDropout(0.5)) for _ in range(2)]
        seed_dropout(members, *names)
        torch.rand(3)  # torch's own generator has no part in it
        return [member[at](x) for member in members for at in (0, 1, 0)]

    first, second = drawn(0, "epoch", 1), drawn(0, "epoch", 1)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    different = {bytes(each.numpy().tobytes()) for each in first + drawn(0, "epoch", 2)}
    assert len(different) == 12


def test_every_dropout_of_a_network_is_replaced() -> None:
    inner = nn.Sequential(StochasticDepth(0.4, "row"))
    network = nn.Sequential(nn.Dropout(0.2), inner, nn.ReLU())
    name_dropout(network)
    plain, deep = network[0], inner[0]
    assert isinstance(plain, NamedDropout)
    assert isinstance(deep, NamedDropout)
    assert (plain.p, plain.rows, deep.p, deep.rows) == (0.2, False, 0.4, True)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny"])
def test_a_copy_drops_alike(name: str) -> None:
    """Features are computed by a network cut from the whole, which holds the same layers."""
    torch.manual_seed(0)
    member = build_torchvision(name, 3, [0.5] * 3, [0.5] * 3, (3, 32, 32)).train()
    assert any(isinstance(layer, NamedDropout) and layer.p > 0 for layer in member.modules())
    x, layer = torch.rand(4, 3, 32, 32), member.depth - 1
    found = []
    for each in (member, copy.deepcopy(member)):
        seed_dropout([each], "one")
        found.append(each(x, layer))
    assert torch.equal(*found)


def test_equal_runs_are_equal_bytes_and_so_are_resumed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = "torchvision:mobilenet_v3_small"
    config = tiny_config(architecture=named, dverge__steps=1, precision="fp32")
    straight = train(config, tmp_path / "one", device=CPU)
    stopped_at_its_first_state(config, tmp_path / "two", monkeypatch)
    torch.manual_seed(11)
    resumed = train(config, tmp_path / "two", device=CPU, resume=True)
    for which in ("standard", "members"):
        one, two = (run.path / f"{which}.safetensors" for run in (straight, resumed))
        assert one.read_bytes() == two.read_bytes()
