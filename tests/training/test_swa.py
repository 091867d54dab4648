"""Averaged weights: the mean of the last epochs, of that stage alone, and never lost by a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import training.trainer
from dverge_serve.errors import UserError
from tests.training.networks import tiny_config, tiny_members
from tests.training.stopping import StoppedError
from training.models.state_dict import members_tensors
from training.runs.directory import Run
from training.schedules import Dverge
from training.swa import Average
from training.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("share", "counted"), [(0.0, [4]), (0.25, [4]), (0.5, [3, 4]), (1.0, [1, 2, 3, 4])]
)
def test_the_mean_of_the_last_epochs_takes_the_members_place(
    share: float, counted: list[int]
) -> None:
    members = tiny_members(2)
    start = {name: tensor.clone() for name, tensor in members_tensors(members).items()}
    average = Average(Dverge(epochs=4, average=share), members, {})
    for epoch in range(4):
        with torch.no_grad():
            for tensor in members_tensors(members).values():  # on the CPU: the members' own
                tensor.add_(1)
        average.add(epoch, members)
    average.put_into(members)
    for name, tensor in members_tensors(members).items():
        if tensor.is_floating_point():  # the others count batches
            torch.testing.assert_close(tensor, start[name] + sum(counted) / len(counted))


def test_means_that_are_not_finite_are_called_so() -> None:
    members = tiny_members(2)
    average = Average(Dverge(epochs=1, average=1.0), members, {})
    with torch.no_grad():
        next(members[1].parameters()).fill_(float("inf"))
    average.add(0, members)
    with pytest.raises(UserError, match="in the averaged weights has values that are not finite"):
        average.put_into(members)


def states_of(
    config: Any, out: Path, monkeypatch: pytest.MonkeyPatch, stop_after: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """Train into `out`, a state after each epoch, until that of (stage, epoch) is saved."""
    save_state, found = Run.save_state, []

    def save(self: Run, stage: int, epoch: int, tensors: dict[str, Tensor]) -> None:
        save_state(self, stage, epoch, tensors)
        found.append({name: tensor.clone() for name, tensor in tensors.items()})
        if (stage, epoch) == stop_after:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(training.trainer, "SAVE_EVERY_S", 0.0)
        patch.setattr(Run, "save_state", save)
        with pytest.raises(StoppedError):
            train(config, out, device=CPU)
    return found


def test_a_run_ends_with_the_mean_and_a_resumed_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(dverge__epochs=4, dverge__average=0.75)
    straight = train(config, tmp_path / "one", device=CPU)
    states = states_of(config, tmp_path / "two", monkeypatch, (1, 3))
    assert any(name.startswith("average0.") for name in states[-1])
    resumed = train(config, tmp_path / "two", device=CPU, resume=True)
    for which in ("standard", "members"):
        one, two = (run.path / f"{which}.safetensors" for run in (straight, resumed))
        assert one.read_bytes() == two.read_bytes()

    # Epochs 2 and 3 are in the states; the fourth is what an unaveraged run of equal steps ends in.
    plain = train(tiny_config(dverge__epochs=4), tmp_path / "three", device=CPU)
    last, mean = (members_tensors(run.members()) for run in (plain, straight))
    for name, tensor in mean.items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            expected = (states[-2][name] + states[-1][name] + last[name]) / 3
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_only_the_stage_that_asks_for_it_is_averaged(tmp_path: Path) -> None:
    first = train(tiny_config(dverge__average=1.0), tmp_path / "one", device=CPU)
    second = train(tiny_config(), tmp_path / "two", device=CPU)
    for which, same in (("standard", True), ("members", False)):
        one, two = (run.path / f"{which}.safetensors" for run in (first, second))
        assert (one.read_bytes() == two.read_bytes()) is same
