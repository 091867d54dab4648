"""Steps that overlap: the same bits as one step after the other, and how far ahead they go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.networks import tiny_config
from training.data.splits import load_training
from training.method_registry import METHODS
from training.methods import TrainingStage, epoch_batches, stages
from training.methods.overlap import AHEAD, Overlapping, each_alone, overlaps, step_losses
from training.models.state_dict import members_tensors
from training.optimizers import momentum_tensors
from training.parallel.topology import SINGLE_PROCESS, Batch, ProcessTopology
from training.schedules import Schedule
from training.trainer import prepare

CPU = torch.device("cpu")
WAIT_S = 30
TORCHVISION = {"architecture": "torchvision:mobilenet_v3_small", "data__train_limit": 120}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(threads: int, **overrides: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return members and momentum after two epochs of the method's stage, and all losses."""
    torch.set_num_threads(threads)
    config = tiny_config(
        members=3, batch_size=80, dverge__schedule="one-cycle", adversarial__steps=2, **overrides
    )
    data = load_training(config.data)
    members, optimizers = prepare(config, data, CPU)
    stage = stages(config, members, optimizers)[-1]
    assert overlaps(stage.step, 3, CPU, SINGLE_PROCESS) == (threads == 2)
    losses = []
    for epoch in range(2):
        batches = enumerate(epoch_batches(data.train, config, stage, epoch))
        losses += list(step_losses(stage, epoch, batches, optimizers, 3, SINGLE_PROCESS))
    return members_tensors(members) | momentum_tensors(optimizers), torch.stack(losses)


@pytest.mark.parametrize(
    "overrides",
    [
        {"method": "standard"},
        {"method": "adversarial"},
        {"dverge__layer_every": "batch"},
        {"dverge__batchnorm": "batch"},
        {"dverge__partners": 1, "architecture": ["resnet8", "resnet14", "resnet8-leaky"]},
        {"method": "dverge+adversarial"},
        {"method": "dverge+adversarial", "dverge__batchnorm": "batch", "dverge__partners": 1},
        {**TORCHVISION, "dverge__layer_every": "batch"},
        {**TORCHVISION, "dverge__layer_every": "batch", "dverge__batchnorm": "batch"},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
def test_every_bit_is_that_of_one_step_after_the_other(overrides: dict[str, Any]) -> None:
    """With more images than are distilled at a time, and a last batch that is smaller."""
    overrides = {"data__train_limit": 240, **overrides}
    (one, losses), (two, same_losses) = trained(1, **overrides), trained(2, **overrides)
    assert torch.equal(losses, same_losses)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def stage(step: Overlapping) -> TrainingStage:
    return TrainingStage(METHODS["standard"], Schedule(), step)


def sgd(count: int) -> list[torch.optim.SGD]:
    return [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(count)]


def numbered(count: int, taken: list[int]) -> Iterator[tuple[int, Batch]]:
    for number in range(count):
        taken.append(number)
        yield number, (torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_members_begin_the_next_step_before_the_last_one_ends_and_none_beyond_it() -> None:
    next_step = threading.Event()
    begun: list[int] = []
    taken: list[int] = []

    def update(index: int, epoch: int, number: int, batch: Batch) -> Tensor:
        begun.append(number)
        if (index, number) == (2, 0):
            assert next_step.wait(WAIT_S), "members 0 and 1 wait for member 2"
            assert max(begun) <= AHEAD
            assert max(taken) <= AHEAD
        if (index, number) == (1, 1):
            next_step.set()
        return torch.tensor(float(10 * number + index))

    made = stage(each_alone(update, range(3)))
    found = list(step_losses(made, 0, numbered(4, taken), sgd(3), 4, SINGLE_PROCESS))
    assert torch.stack(found).tolist() == [[10.0 * n + i for i in range(3)] for n in range(4)]


def test_each_step_is_made_at_its_own_learning_rate() -> None:
    optimizers = sgd(3)
    rates: dict[tuple[int, int], float] = {}

    def update(index: int, epoch: int, number: int, batch: Batch) -> Tensor:
        rates[index, number] = optimizers[index].param_groups[0]["lr"]
        return torch.zeros(())

    schedule = Schedule(epochs=2, lr=0.3, schedule="one-cycle")
    made = TrainingStage(METHODS["standard"], schedule, each_alone(update, range(3)))
    list(step_losses(made, 1, numbered(5, []), optimizers, 5, SINGLE_PROCESS))
    assert rates == {(i, n): schedule.lr_at(1, n / 5) for i in range(3) for n in range(5)}


def test_an_error_in_a_member_ends_the_steps() -> None:
    made: list[tuple[int, int]] = []

    def update(index: int, epoch: int, number: int, batch: Batch) -> Tensor:
        if (index, number) == (1, 2):
            raise RuntimeError("out of order")
        made.append((index, number))
        return torch.zeros(())

    losses = step_losses(
        stage(each_alone(update, range(3))), 0, numbered(9, []), sgd(3), 9, SINGLE_PROCESS
    )
    with pytest.raises(RuntimeError, match="out of order"):
        list(losses)
    assert (1, 1) in made
    assert max(number for _, number in made) <= 2 + AHEAD


def test_steps_overlap_where_one_process_has_a_member_for_every_core() -> None:
    step = each_alone(lambda *_: torch.zeros(()), range(3))
    assert overlaps(step, 2, CPU, SINGLE_PROCESS)
    assert not overlaps(step, 1, CPU, SINGLE_PROCESS), "operations get both cores"
    assert not overlaps(step, 3, torch.device("cuda"), SINGLE_PROCESS)
    assert not overlaps(step, 3, CPU, ProcessTopology(blocks=2))
    assert not overlaps(step.whole, 3, CPU, SINGLE_PROCESS)
    torch.set_num_threads(1)
    assert not overlaps(step, 3, CPU, SINGLE_PROCESS)
