"""Standard training, each member alone, and the optimiser step that every method ends with.

Steps take `source` float `[B, C, H, W]` in `[0,1]` and `labels` `[B]`, update the members in place
and return the loss of each of this process's members, detached, `[members]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer

from training.config import Config
from training.methods import Step
from training.methods.overlap import each_alone
from training.models.member import Member
from training.optimizers import clip
from training.parallel import cuda_graphs
from training.parallel.topology import Batch, ProcessTopology


def descend(optimizers: Sequence[Optimizer], loss: Tensor, topology: ProcessTopology) -> Tensor:
    """Take one step of every optimiser down `loss` and return it, detached."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        topology.average_gradients(optimizer)
        clip(optimizer)
        optimizer.step()
    return loss.detach()


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run, on a GPU recorded as a CUDA graph.

    Each member alone, cross-entropy on clean images.
    """
    mine = topology.local_members(len(members))

    def update(index: int, epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        loss = F.cross_entropy(members[index].train()(source), labels)
        return descend([optimizers[index]], loss, topology)

    def work(layer: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        source, labels = inputs
        return [step(0, 0, (source, labels, source))]

    step = each_alone(update, mine)
    own, device = [optimizers[index] for index in mine], members[0].mean.device
    (recorded,) = cuda_graphs.recorded([work], config, own, device)
    if recorded is work:
        return step
    return lambda epoch, number, batch: recorded(0, batch[:2])[0]
