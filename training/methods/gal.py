"""Gradient alignment loss (Kariyappa & Qureshi, 2019): one step.

Where processes share the members, what the others' contribute is a constant: each takes its own
part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from training.config import Config
from training.methods import Step
from training.methods.standard import descend
from training.models.member import Member
from training.parallel.topology import Batch, ProcessTopology


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run: the members learn together (Kariyappa & Qureshi, 2019, eq. 8).

    `mean_k CE(F_k) + lambda * GAL`, see `gal_term`. Its authors take members with leaky ReLU: where
    ReLU is flat, a gradient's gradient is zero.
    """
    settings, mine = config.gal, topology.local_members(len(members))

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        x = source.detach().requires_grad_()
        losses = torch.stack([F.cross_entropy(members[k].train()(x), labels) for k in mine])
        own = [torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1) for loss in losses]
        gradients = topology.exchange(own, len(members))
        total = losses.sum() / len(members) + settings.weight * gal_term(gradients)
        descend([optimizers[k] for k in mine], total, topology)
        return losses.detach()

    return step


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
