"""Losses that attacks raise, and the ways to combine the members into the output they attack.

A loss takes images `[N, C, H, W]` in `[0,1]` and returns one value an image `[N]`; an output takes
the same images and returns one score a class `[N, classes]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.pgd import Loss, Output, member_logits


def cw_margin(output: Output, labels: Tensor) -> Loss:
    """Return the margin of the best wrong class over the right one (Carlini & Wagner, 2017)."""
    return lambda x: margins(output(x), labels)


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return best wrong less right score, over the last axis; `[..., N]` from `[..., N, K]`."""
    index = labels.expand(scores.shape[:-1])[..., None]
    right = scores.gather(-1, index)[..., 0]
    return scores.scatter(-1, index, -torch.inf).amax(-1) - right


def dlr(output: Output, labels: Tensor) -> Loss:
    """Return the difference of logits ratio (Croce & Hein, 2020, eq. 6); needs three classes.

    The margin over the distance of the first to the third score: no scale of the logits hides it.
    """

    def loss(x: Tensor) -> Tensor:
        scores = output(x)
        top = scores.topk(3, dim=1).values
        spread = (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(scores.dtype).eps)
        return margins(scores, labels) / spread

    return loss


def dlr_targeted(scores: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio (Croce & Hein, 2020, eq. 7), `[N]`.

    The target's margin over the right class, over the distance of the first score to the middle of
    the third and fourth; needs four classes.
    """
    top = scores.topk(4, dim=1).values
    spread = (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(torch.finfo(scores.dtype).eps)
    ahead = scores.gather(1, targets[:, None]) - scores.gather(1, labels[:, None])
    return ahead[:, 0] / spread


def member_reweighted(members: Sequence[nn.Module], labels: Tensor) -> Loss:
    """Return the members' margins, weighed by how nearly each is fooled, after MORA.

    The idea of Gao et al. (2022): an ensemble is fooled when enough members are, so the gradient
    goes to those nearest to it. Each margin is divided by the member's own spread of scores, and
    the weights are a softmax of them, held constant: `sum_i w_i m_i`,
    `w = softmax_i(-|m_i| / mean |m|)`.
    """

    def loss(x: Tensor) -> Tensor:
        stack = member_logits(members, x)
        spread = stack.detach().std(-1).clamp_min(torch.finfo(stack.dtype).eps)
        each = margins(stack, labels) / spread
        far = each.detach().abs()
        weights = (-far / far.mean(0).clamp_min(torch.finfo(stack.dtype).eps)).softmax(0)
        return (weights * each).sum(0)

    return loss


def mean_softmax_output(members: Sequence[nn.Module]) -> Output:
    """Return the log of the members' mean softmax, the combination of the paper's own code."""

    def output(x: Tensor) -> Tensor:
        logs = member_logits(members, x).log_softmax(-1)
        return logs.logsumexp(0) - math.log(len(members))

    return output


def logsumexp_output(members: Sequence[nn.Module]) -> Output:
    """Return the log of the members' mean exponential logits: the loudest member leads."""
    return lambda x: member_logits(members, x).logsumexp(0) - math.log(len(members))
