"""The methods DVERGE is compared with: adversarial training, ADP and GAL, one step each.

All take `source` float `[B, C, H, W]` in `[0,1]` and `labels` `[B]`, update the members in place
and return the loss of each of this process's members, detached, `[members]`. Where processes share
the members (`team`), what the others' contribute is a constant: each takes its own part of the
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from training.attacks import ascend, cross_entropy, random_start, sign_rule
from training.config import Adp, Adversarial, Gal
from training.methods.dverge import descend
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import ALONE, Team
from training.seeds import generator


def adversarial_images(
    member: Member,
    source: Tensor,
    labels: Tensor,
    settings: Adversarial,
    *names: int | str,
) -> Tensor:
    """Return PGD examples made on `member` itself (Madry et al., 2018), from a random start.

    Args:
        member: attacked in evaluation mode; left in training mode.
        source: clean images.
        labels: their classes.
        settings: radius and steps.
        names: what the random start is drawn for (see `training.seeds`).
    """
    member.eval()
    draw = generator(*names, device=source.device)
    made = ascend(
        cross_entropy(member, labels),
        source,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        rule=sign_rule(),
        start=random_start(source, settings.eps, draw),
    )
    member.train()
    return made


def adversarial_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    settings: Adversarial,
    names: Sequence[int | str],
    team: Team = ALONE,
) -> Tensor:
    """Train each member alone on PGD examples of its own (Madry et al., 2018, eq. 2.1)."""

    def update(index: int) -> Tensor:
        member = members[index]
        made = adversarial_images(member, source, labels, settings, *names, index)
        return descend(optimizers[index], F.cross_entropy(member(made), labels), team)

    return torch.stack(side_by_side(update, team.mine(len(members)), source.device))


def adp_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    settings: Adp,
    team: Team = ALONE,
) -> Tensor:
    """Train the members together with adaptive diversity promoting (Pang et al., 2019, eq. 5).

    `sum_k CE(F_k) - alpha * H(mean F) - beta * log det(M^T M)`, where M's columns are the members'
    non-maximal predictions: softmax without the true class, scaled to length 1.
    """
    mine = team.mine(len(members))
    own = [members[k].train()(source) for k in mine]
    logits = torch.stack(team.exchange(own, len(members)), 1)
    losses = torch.stack([F.cross_entropy(logits[:, k], labels) for k in mine])
    entropy, diversity = adp_terms(logits, labels)
    total = losses.sum() - settings.alpha * entropy - settings.beta * diversity
    _descend_together([optimizers[k] for k in mine], total, team)
    return losses.detach()


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
    wrong = torch.ones_like(mean, dtype=torch.bool).scatter(1, labels[:, None], False)
    members, classes = logits.shape[1:]
    others = probabilities[wrong[:, None].expand_as(probabilities)]
    unit = F.normalize(others.view(-1, members, classes - 1), dim=2)
    # Near-equal predictions make the determinant vanish; the ridge keeps its log finite.
    ridge = 1e-6 * torch.eye(members, device=logits.device, dtype=logits.dtype)
    return entropy, torch.logdet(unit @ unit.transpose(1, 2) + ridge).mean()


def gal_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    settings: Gal,
    team: Team = ALONE,
) -> Tensor:
    """Train the members together with gradient alignment loss (Kariyappa & Qureshi, 2019, eq. 8).

    `mean_k CE(F_k) + lambda * GAL`, see `gal_term`. Its authors take members with leaky ReLU: where
    ReLU is flat, a gradient's gradient is zero.
    """
    x = source.detach().requires_grad_()
    mine = team.mine(len(members))
    losses = torch.stack([F.cross_entropy(members[k].train()(x), labels) for k in mine])
    own = [torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1) for loss in losses]
    gradients = team.exchange(own, len(members))
    total = losses.sum() / len(members) + settings.weight * gal_term(gradients)
    _descend_together([optimizers[k] for k in mine], total, team)
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


def _descend_together(optimizers: Sequence[Optimizer], loss: Tensor, team: Team) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        team.average(optimizer)
        optimizer.step()
