"""The steps of a run of DVERGE, with or without adversarial training beside it; see `dverge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD

from training.config import Config
from training.methods import Step, adversarial, dverge
from training.methods.dverge import Adversary, distill_in_parts, learner, ready
from training.methods.dverge_draws import draw_partners, layer_of
from training.methods.overlap import Overlapping
from training.models.member import Member
from training.parallel import cuda_graphs
from training.parallel.cuda_graphs import Work
from training.parallel.tasks import Tasks
from training.parallel.topology import SINGLE_PROCESS, Batch, ProcessTopology
from training.schedules import Dverge


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run, see `step`; on a GPU its halves are recorded as CUDA graphs."""
    own = [optimizers[index] for index in topology.local_members(len(members))]
    parts = dverge.halves(members, optimizers, settings=config.dverge, topology=topology)
    recorded = cuda_graphs.recorded(parts, config, own, members[0].mean.device)
    found = _step_of_run(config, members, optimizers, topology, lambda *_: None, recorded)
    return found if tuple(recorded) == parts else found.whole


def make_adversarial_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run with adversarial training beside it; see `step`.

    It is not recorded: it draws random starts, which a recording cannot repeat.
    """

    def adversary_of(epoch: int, number: int, batch: Batch) -> Adversary:
        source, labels, _ = batch
        seed_path = (config.seed, "dverge", epoch, number)

        def adversary(index: int, member: Member) -> tuple[Tensor, Tensor]:
            made = adversarial.adversarial_images(
                member, source, labels, config.adversarial, *seed_path, index, *topology.seed_path
            )
            return made, labels

        return adversary

    return _step_of_run(config, members, optimizers, topology, adversary_of)


def _step_of_run(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
    adversary_of: Callable[[int, int, Batch], Adversary | None],
    parts: Sequence[Work] | None = None,
) -> Overlapping:
    def drawn(epoch: int, number: int, batch: Batch) -> dict[str, Any]:
        return {
            "layer": layer_of(config, members, epoch, number),
            "partners": draw_partners(config, epoch, number),
            "settings": config.dverge,
            "adversary": adversary_of(epoch, number, batch),
        }

    def whole(epoch: int, number: int, batch: Batch) -> Tensor:
        own = drawn(epoch, number, batch)
        return dverge.step(members, optimizers, *batch, **own, topology=topology, parts=parts)

    def begin(tasks: Tasks, epoch: int, number: int, batch: Batch) -> list[Future[Tensor]]:
        return begin_step(tasks, members, optimizers, *batch, **drawn(epoch, number, batch))

    return Overlapping(whole, begin)


def begin_step(
    tasks: Tasks,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    settings: Dverge,
    partners: Sequence[Sequence[int]],
    adversary: Adversary | None = None,
) -> list[Future[Tensor]]:
    """Queue the same `step` and return each member's future loss.

    A member learns as soon as its partners' images are there. It does not wait for its own, which
    its frozen copy makes.
    """
    learn = learner(members, optimizers, settings, adversary, SINGLE_PROCESS)
    deepest, made = max(member.depth for member in members), []
    for index, member in enumerate(members):
        network = index if settings.batchnorm == "batch" else ("frozen copy", index)
        prepared = tasks.add(partial(ready, member, settings), uses={index, network})
        own: dict[str, Any] = {"layer": member.layer_at(layer, deepest), "settings": settings}
        distil = partial(distill_in_parts, source=source, target=target, **own)
        made.append(tasks.add(distil, uses=[network], needs=[prepared]))

    def learn_from(index: int, *learned: Tensor) -> Tensor:
        return learn(index, source, learned, labels)

    return [
        tasks.add(partial(learn_from, index), uses=[index], needs=[made[other] for other in others])
        for index, others in enumerate(partners)
    ]
