"""Gradient alignment loss (Kariyappa & Qureshi, 2019): one step.

Where processes share the members, what the others' contribute is a constant: each takes its own
part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer

from training.config import Config
from training.methods import Step
from training.methods.standard import descend_together
from training.models.member import Member
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology
from training.schedules import Gal


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run; see `gal_step`."""
    return lambda epoch, number, batch: gal_step(
        members, optimizers, *batch[:2], settings=config.gal, topology=topology
    )


def gal_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    settings: Gal,
    topology: ProcessTopology = SINGLE_PROCESS,
) -> Tensor:
    """Train the members together with gradient alignment loss (Kariyappa & Qureshi, 2019, eq. 8).

    `mean_k CE(F_k) + lambda * GAL`, see `gal_term`. Its authors take members with leaky ReLU: where
    ReLU is flat, a gradient's gradient is zero.
    """
    x = source.detach().requires_grad_()
    mine = topology.local_members(len(members))
    losses = torch.stack([F.cross_entropy(members[k].train()(x), labels) for k in mine])
    own = [torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1) for loss in losses]
    gradients = topology.exchange(own, len(members))
    total = losses.sum() / len(members) + settings.weight * gal_term(gradients)
    descend_together([optimizers[k] for k in mine], total, topology)
    return losses.detach()


def gal_term(gradients: Sequence[Tensor]) -> Tensor:
    """Return `log sum_{a<b} exp(cosine(grad_a, grad_b))`, the mean over images, a scalar.

    Args:
        gradients: each member's gradient of its loss on the images, `[B, pixels]`.
    """
    cosines = [
        F.cosine_similarity(one, other, dim=1)
        for index, one in enumerate(gradients)
        for other in gradients[index + 1 :]
    ]
    return torch.stack(cosines).logsumexp(0).mean()
