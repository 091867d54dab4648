"""Standard training, each member alone, and the optimiser step that every method ends with.

Steps take `source` float `[B, C, H, W]` in `[0,1]` and `labels` `[B]`, update the members in place
and return the loss of each of this process's members, detached, `[members]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer

from training.config import Config
from training.methods import Step
from training.models.member import Member
from training.parallel import cuda_graphs as graphs
from training.parallel.threads import side_by_side
from training.parallel.topology import SINGLE_PROCESS, Batch, ProcessTopology


def descend(
    optimizer: Optimizer, loss: Tensor, topology: ProcessTopology = SINGLE_PROCESS
) -> Tensor:
    """Take one optimiser step down `loss` and return it, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    topology.average_gradients(optimizer)
    optimizer.step()
    return loss.detach()


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run, on a GPU recorded as a CUDA graph; see `standard_step`."""

    def work(layer: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return standard_step(members, optimizers, source, labels, topology=topology)

    recorded = graphs.recorded(work, config, optimizers, members[0].mean.device)
    return lambda epoch, number, batch: recorded(0, batch)


def standard_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    topology: ProcessTopology = SINGLE_PROCESS,
) -> Tensor:
    """Make one step of ordinary training: each member alone, cross-entropy on clean images.

    Returns:
        the loss of each of this process's members, detached, `[members]`.
    """

    def update(index: int) -> Tensor:
        member = members[index].train()
        return descend(optimizers[index], F.cross_entropy(member(source), labels), topology)

    return torch.stack(side_by_side(update, topology.local_members(len(members)), source.device))


def descend_together(
    optimizers: Sequence[Optimizer], loss: Tensor, topology: ProcessTopology
) -> None:
    """Take one step of all optimisers down a loss that the members share."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        topology.average_gradients(optimizer)
        optimizer.step()
