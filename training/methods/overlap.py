"""Steps that overlap: on the CPU members that are done with a step begin the next one.

Each result is the same as if every step ended before the next began: see `Tasks`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD

from training.methods import Step, TrainingStage
from training.optimizers import set_rate
from training.parallel.tasks import Tasks
from training.parallel.threads import one_thread_inside, side_by_side
from training.parallel.topology import Batch, ProcessTopology

AHEAD = 1  # steps that may be begun before one ends, with a batch in memory for each

Begin = Callable[[Tasks, int, int, Batch], Sequence[Future[Tensor]]]
Update = Callable[[int, int, int, Batch], Tensor]  # member, epoch, batch number, batch -> own loss


@dataclass(frozen=True)
class Overlapping:
    """A `Step` that can also be queued as tasks, so that the next one may begin before it ends.

    Args:
        whole: the step.
        begin: queues it and returns the future loss of each member, detached. What trains member
            `i` names `i` among what it uses; where all members are this process's.
    """

    whole: Step
    begin: Begin

    def __call__(self, epoch: int, number: int, batch: Batch) -> Tensor:
        """Make the step and return the losses of this process's members, detached `[members]`."""
        return self.whole(epoch, number, batch)


def each_alone(update: Update, members: Sequence[int]) -> Overlapping:
    """Return the step in which each member learns by itself.

    Args:
        update: trains one member on a batch and returns its loss, detached.
        members: indices of this process's.
    """

    def whole(epoch: int, number: int, batch: Batch) -> Tensor:
        def work(index: int) -> Tensor:
            return update(index, epoch, number, batch)

        return torch.stack(side_by_side(work, members, batch[0].device))

    def begin(tasks: Tasks, epoch: int, number: int, batch: Batch) -> list[Future[Tensor]]:
        return [
            tasks.add(partial(update, index, epoch, number, batch), uses=[index])
            for index in members
        ]

    return Overlapping(whole, begin)


def overlaps(step: Step, members: int, device: torch.device, topology: ProcessTopology) -> bool:
    """Whether steps overlap: on CPU cores that the members of one process keep busy.

    With more cores than members, an operation or a part of a batch gets several of them instead.
    """
    alone = device.type == "cpu" and topology.size == 1
    return isinstance(step, Overlapping) and alone and 1 < torch.get_num_threads() <= members


def step_losses(
    stage: TrainingStage,
    epoch: int,
    batches: Iterable[tuple[int, Batch]],
    optimizers: Sequence[SGD],
    count: int,
    topology: ProcessTopology,
) -> Generator[Tensor]:
    """Make the steps of an epoch and yield each one's losses, `[members of this process]`.

    Args:
        stage: whose steps they are.
        epoch: counted from 0.
        batches: the number of each in the epoch, and this process's share of it.
        optimizers: all members'.
        count: how many steps an epoch has.
        topology: of the processes that train together.
    """

    def pace(optimizers: Sequence[SGD], number: int) -> None:
        set_rate(optimizers, stage.settings, epoch, number / count)

    step = stage.step
    device = optimizers[0].param_groups[0]["params"][0].device
    if not overlaps(step, len(optimizers), device, topology):
        for number, batch in batches:
            pace(optimizers, number)
            yield step(epoch, number, batch)
        return
    assert isinstance(step, Overlapping)
    begun: deque[Sequence[Future[Tensor]]] = deque()
    # Making the next batch is this thread's own work; it would wait for threads that have no core.
    with Tasks(torch.get_num_threads()) as tasks, one_thread_inside():
        for number, batch in batches:
            for index, optimizer in enumerate(optimizers):
                tasks.add(partial(pace, [optimizer], number), uses=[index])
            begun.append(step.begin(tasks, epoch, number, batch))
            if len(begun) > AHEAD:
                yield _losses(begun.popleft())
        yield from map(_losses, begun)


def _losses(found: Sequence[Future[Tensor]]) -> Tensor:
    return torch.stack([each.result() for each in found])
