"""New last layers on starting weights: fitted to features that are computed once.

A last layer that is a random draw sends large gradients through the network, which spoil what the
starting weights know before the layer has learned anything. Alone it is a convex problem: seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dverge_serve.progress import Progress
from training.config import Config
from training.data.splits import Split, batches
from training.data.streaming import Streamed
from training.models.member import Member
from training.models.pretrained import Start, last_layer
from training.parallel.threads import side_by_side

RIDGE = 0.1  # of the squared distance from the layer's random draw, which keeps members apart
ITERATIONS = 100


def fit_last_layers(
    config: Config,
    members: Sequence[Member],
    start: Start | None,
    images: Split | Streamed,
    draw: str,
) -> None:
    """Fit the last layers that starting weights leave to a random draw, if `head_views` is set.

    Each member learns from augmented views of its own. Only linear layers are fitted.

    Args:
        config: of the run.
        members: updated in place.
        start: the starting weights, if there are any.
        images: of the training part.
        draw: names the random draws, see `training.models.build.build_members`.
    """
    if start is None or not config.head_views:
        return
    fresh = [
        index
        for index, drawn in enumerate(start.drawn(members))
        if drawn and isinstance(last_layer(members[index])[1], nn.Linear)
    ]
    total = len(fresh) * config.head_views * len(images)
    with Progress("fitting last layers, images", total) as progress:

        def one(index: int) -> None:
            fit(members[index], *_features(config, members[index], images, index, draw, progress))

        side_by_side(one, fresh, members[0].mean.device)


def fit(member: Member, features: Tensor, labels: Tensor) -> None:
    """Fit a member's last layer: cross-entropy, and a ridge around the layer's present weights.

    Args:
        member: its last layer is linear.
        features: what that layer takes, float `[N, F]`.
        labels: int64 `[N]`, or probabilities `[N, K]`.
    """
    layer = last_layer(member)[1]
    parameters = list(layer.parameters())
    drawn = [each.detach().clone() for each in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        apart = [(now - was).square().sum() for now, was in zip(parameters, drawn, strict=True)]
        found = F.cross_entropy(layer(features), labels) + RIDGE * torch.stack(apart).sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def _features(
    config: Config,
    member: Member,
    images: Split | Streamed,
    index: int,
    draw: str,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Return what a member's last layer takes for its augmented views, `[N, F]`, and the labels."""
    labels = []

    def views() -> Iterator[Tensor]:
        for view in range(config.head_views):
            seed_path = (config.seed, draw, "views", index, view)
            for source, classes in batches(images, config.batch_size, config.data, *seed_path):
                labels.append(classes)
                yield source
                progress.advance(len(classes))

    return last_features(member, views()), torch.cat(labels)


def last_features(member: Member, images: Iterable[Tensor]) -> Tensor:
    """Return what a member's last layer takes, float `[N, F]`, in evaluation mode.

    Args:
        member: its last layer is linear.
        images: batches, float `[B, C, H, W]` in `[0,1]`.
    """
    found: list[Tensor] = []
    hook = last_layer(member)[1].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].float())
    )
    member.eval()
    try:
        with torch.no_grad():
            for batch in images:
                member(batch)
    finally:
        hook.remove()
    return torch.cat(found)
