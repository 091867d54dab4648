"""Adaptive diversity promoting (Pang et al., ICML 2019): one step.

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
    """Return the step of a run, in which the members learn together (Pang et al., 2019, eq. 5).

    `sum_k CE(F_k) - alpha * H(mean F) - beta * log det(M^T M)`, where M's columns are the members'
    non-maximal predictions: softmax without the true class, scaled to length 1.
    """
    settings, mine = config.adp, topology.local_members(len(members))

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        own = [members[k].train()(source) for k in mine]
        logits = torch.stack(topology.exchange(own, len(members)), 1)
        losses = torch.stack([F.cross_entropy(logits[:, k], labels) for k in mine])
        entropy, diversity = adp_terms(logits, labels)
        total = losses.sum() - settings.alpha * entropy - settings.beta * diversity
        descend([optimizers[k] for k in mine], total, topology)
        return losses.detach()

    return step


def adp_terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ADP's two regularisers, means over the batch.

    Args:
        logits: `[B, members, classes]`.
        labels: `[B]`.

    Returns:
        the entropy of the mean prediction and the log of the ensemble diversity, scalars.
    """
    probabilities = logits.softmax(2)
    mean = probabilities.mean(1)
    entropy = -(mean * (mean + 1e-20).log()).sum(1).mean()
    members, classes = logits.shape[1:]
    # Not a mask: how many values one chooses is known only after waiting for the device.
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    others = others + (others >= labels[:, None])
    wrong = probabilities.gather(2, others[:, None].expand(-1, members, -1))
    unit = F.normalize(wrong, dim=2)
    # Near-equal predictions make the determinant vanish; the ridge keeps its log finite.
    ridge = 1e-6 * torch.eye(members, device=logits.device, dtype=logits.dtype)
    return entropy, torch.logdet(unit @ unit.transpose(1, 2) + ridge).mean()
