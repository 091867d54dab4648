"""Stages of a run, and the batches of their steps; `training.method_registry` lists the methods.

Each method is a module with a `MakeStep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD

from training.config import Config
from training.data.splits import Split, batches
from training.data.streaming import Streamed
from training.method_registry import METHODS, Method
from training.models.member import Member
from training.parallel.topology import SINGLE_PROCESS, Batch, ProcessTopology
from training.schedules import Schedule

# Epoch, batch number, batch -> own losses [members]; an `Overlapping` one may begin early, too.
Step = Callable[[int, int, Batch], Tensor]
MakeStep = Callable[[Config, Sequence[Member], Sequence[SGD], ProcessTopology], Step]


@dataclass(frozen=True)
class TrainingStage:
    """One stage of training.

    Args:
        method: whose stage it is.
        settings: its schedule.
        step: trains this process's members on one batch.
    """

    method: Method
    settings: Schedule
    step: Step

    @property
    def name(self) -> str:
        """The stage's name, also of its table in the recipe."""
        return self.method.settings.table


def stages(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology = SINGLE_PROCESS,
    stored: Any = None,
) -> list[TrainingStage]:
    """Return the stages of `config.method`: standard training, then the method's own.

    Every method begins with standard members: DVERGE starts from them, and for all they are the
    undefended control.

    Args:
        stored: the `StoredImages` of methods that learn from source models.
    """

    def stage(method: Method) -> TrainingStage:
        make_step, more = method.load_make_step(), [stored] if method.sources else []
        step = make_step(config, members, optimizers, topology, *more)
        return TrainingStage(method, config.settings_of(method.settings.table), step)

    return [stage(method) for method in _methods(config)]


def stage_names(config: Config) -> list[str]:
    """Return the names of the stages of `config.method`."""
    return [method.settings.table for method in _methods(config)]


def _methods(config: Config) -> list[Method]:
    return [METHODS[name] for name in dict.fromkeys(("standard", config.method))]


def epoch_batches(
    split: Split | Streamed, config: Config, stage: TrainingStage, epoch: int
) -> Iterator[Batch]:
    """Yield source batches, with independently shuffled and augmented targets where needed."""
    seed_path = (config.seed, stage.name, epoch)
    sources = batches(split, config.batch_size, config.data, *seed_path, "source")
    if not stage.method.pairs:
        for source, labels in sources:
            yield source, labels, source
        return
    targets = batches(split, config.batch_size, config.data, *seed_path, "target")
    for (source, labels), (target, _) in zip(sources, targets, strict=True):
        yield source, labels, target
