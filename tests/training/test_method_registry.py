"""Methods from outside: registered, they train, resume and are estimated like the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.budget import gradient_evaluations
from training.config import Config, differences
from training.method_registry import METHODS, Method, register
from training.methods import Step
from training.methods.standard import descend
from training.models.member import Member
from training.parallel.topology import Batch, ProcessTopology
from training.runs.directory import Run
from training.schedules import Schedule
from training.trainer import train


@dataclass(frozen=True, kw_only=True)
class Smoothed(Schedule):
    """Label smoothing: each member alone."""

    table = "smoothed"

    share: float = 0.1


def make_step(
    config: Config, members: Sequence[Member], optimizers: Sequence[SGD], topology: ProcessTopology
) -> Step:
    settings = config.settings_of("smoothed")
    assert isinstance(settings, Smoothed)

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        losses = []
        for index in topology.local_members(len(members)):
            logits = members[index].train()(source)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.share)
            losses.append(descend([optimizers[index]], loss, topology))
        return torch.stack(losses)

    return step


@pytest.fixture
def smoothed() -> Iterator[None]:
    register("smoothed", Method(settings=Smoothed, make_step=make_step, gradients=lambda _: 3))
    yield
    del METHODS["smoothed"]


@pytest.mark.usefixtures("smoothed")
def test_a_method_of_ones_own_trains_with_settings_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(method="smoothed", smoothed__epochs=3, smoothed__share=0.3)
    assert config.settings_of("smoothed") == Smoothed(epochs=3, share=0.3)
    run = train(config, tmp_path / "run", device="cpu")
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert stages == ["standard"] * 2 + ["smoothed"] * 3
    assert json.loads((run.path / "config.json").read_text())["smoothed"]["share"] == 0.3
    assert Run(run.path).config == config
    other = config.overridden({"smoothed.share": 0.2})
    assert differences(config, other) == ["smoothed.share"]
    with pytest.raises(UserError, match=r"other settings of smoothed\.share"):
        train(other, run.path, device="cpu", resume=True)
    assert gradient_evaluations(config, 100) == {"standard": 400, "smoothed": 3 * 3 * 100 * 2}
    weights = [made.state_dict()["stages.0.conv.weight"] for made in run.members()]
    before = [made.state_dict()["stages.0.conv.weight"] for made in run.members("standard")]
    assert not torch.equal(weights[0], before[0])


@pytest.mark.usefixtures("smoothed")
def test_its_settings_are_written_and_checked_like_the_others() -> None:
    assert tiny_config(method="smoothed").to_json()["smoothed"]["share"] == 0.1
    assert "smoothed" not in tiny_config().to_json()  # nor does it show where it is not used
    with pytest.raises(UserError, match=r"did you mean 'smoothed.share'"):
        tiny_config(method="smoothed", smoothed__shrae=0.3)
    with pytest.raises(UserError, match=r"smoothed\.epochs = 0"):
        tiny_config(method="smoothed", smoothed__epochs=0)


@pytest.mark.usefixtures("smoothed")
def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="'smoothed' already"):
        register("smoothed", Method(settings=Smoothed, make_step=make_step))
    with pytest.raises(ValueError, match="needs a `table`"):
        register("plain", Method(settings=Schedule, make_step=make_step))
    with pytest.raises(UserError, match=r"one of dverge, standard, .*smoothed"):
        tiny_config(method="plain")


def test_without_it_the_settings_are_unknown() -> None:
    with pytest.raises(UserError, match="unknown key 'smoothed'"):
        tiny_config(smoothed__share=0.3)
    with pytest.raises(UserError, match="unknown key '_own'"):
        tiny_config(_own=[])


@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_every_method_is_where_the_table_says(name: str) -> None:
    assert callable(METHODS[name].load_make_step())
