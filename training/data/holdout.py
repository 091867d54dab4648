"""The hold-out: which of the training images are kept for choosing, by images or by groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dverge_serve.errors import UserError
from training.config import Data
from training.seeds import generator


def parts(
    targets: npt.NDArray[np.int64],
    labels: tuple[str, ...],
    data: Data,
    groups: Sequence[str] = (),
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows for training and the rows held out.

    They are drawn at random, and by class where that would leave a class out of either. Where
    there are groups, whole ones are drawn, about the same share of every class.
    """
    if groups:
        names = sorted(set(groups))
        drawn = torch.randperm(len(names), generator=generator("holdout")).tolist()
        held_out = whole_groups(targets.tolist(), groups, data.holdout, [names[at] for at in drawn])
        if not held_out.any():
            raise UserError(
                f"no group of data.group = {data.group} can be held out ({len(names)} groups)",
                "two groups or more of a class",
            )
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
    order = torch.randperm(len(targets), generator=generator("holdout")).numpy()
    held = max(1, round(data.holdout * len(order)))
    if len(order) - held < 2:
        raise UserError(
            f"{len(order)} training images in '{data.path or data.name}'",
            "enough for training and a held-out part",
        )
    if any(len(np.unique(targets[part])) < len(labels) for part in (order[held:], order[:held])):
        order = order[np.argsort(_places(targets[order]), kind="stable")]
    kept, out = np.sort(order[held:]), np.sort(order[:held])
    missing = [labels[index] for index in set(range(len(labels))) - set(targets[kept].tolist())]
    if missing:
        raise UserError(
            f"no training image left of class '{sorted(missing)[0]}' ({len(missing)} such)",
            "every class in the training part",
            "raise data.train_limit or lower data.holdout",
        )
    return kept, out


def _places(targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return where each image stands within its class, from 0 to 1, in the order given.

    By it, the first images of an order are as good as the same share of every class.
    """
    places = np.empty(len(targets))
    for label in np.unique(targets):
        rows = np.flatnonzero(targets == label)
        places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return places


def whole_groups(
    targets: Sequence[int], groups: Sequence[str], share: float, order: Iterable[str]
) -> npt.NDArray[np.bool_]:
    """Return which images to set aside, bool `[N]`: whole groups, about `share` of every class.

    Of every class that has two groups one at least is set aside, if it has half of the class's
    images at most. A class never loses all of its images.

    Args:
        targets: the images' classes, `N`.
        groups: the images' groups, `N`.
        share: of each class's images, 0.5 at most.
        order: every group once; the first ones that fit are taken.
    """
    images = Counter(targets)
    classes: dict[str, Counter[int]] = defaultdict(Counter)
    for target, group in zip(targets, groups, strict=True):
        classes[group][target] += 1
    held: Counter[int] = Counter()
    taken = set()
    for group in order:
        if all(
            held[target] + count / 2 <= share * images[target]
            if held[target]
            else 2 * count <= images[target]
            for target, count in classes[group].items()
        ):
            taken.add(group)
            held += classes[group]
    return np.array([group in taken for group in groups], dtype=bool)
