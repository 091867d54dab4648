"""The search for a foreign classifier's contract: each is tried on clean images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from dverge_serve.errors import UserError
from dverge_serve.progress import Progress
from training.seeds import derive
from verification.contract import Contract
from verification.metrics.statistics import mcnemar

IMAGES = 256  # at most; held-out training images, so that no test image chooses anything
ALIKE = 0.05  # p-value above which two contracts cannot be told apart
CHANCE = 0.001  # p-value above which the best contract may be guessing
Form = dict[str, Any]
# How images are usually prepared, the plainest first: of equally good ones the first is taken.
FORMS: tuple[Form, ...] = (
    {"pixel_max": 1},
    {"pixel_max": 255},
    {"pixel_max": 1, "mean": (0.5,), "std": (0.5,)},
    {"pixel_max": 1, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},  # ImageNet
    {"pixel_max": 1, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.201)},  # CIFAR-10
    {"pixel_max": 255, "mean": (123.675, 116.28, 103.53)},  # Caffe
)

Predict = Callable[[Contract], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        contract: the best one.
        tried: every contract and the images it is right on, the best first.
        images: how many there were.
        alike: those of `tried` that are not significantly worse than the best (McNemar's test).
    """

    contract: Contract
    tried: Sequence[tuple[Contract, int]]
    images: int
    alike: Sequence[Contract]

    def __str__(self) -> str:
        (_, best), *others = self.tried
        text = f"{self.contract} is right on {best} of {self.images} held-out images"
        if others:
            text += f", the next ({others[0][0]}) on {others[0][1]}"
        if self.alike:
            text += f"; NOT told apart from: {'; '.join(map(str, self.alike))}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the form kept in the report."""
        return {
            "images": self.images,
            "tried": [{"contract": str(each), "right": right} for each, right in self.tried],
            "alike": [str(each) for each in self.alike],
        }


def sample(count: int) -> npt.NDArray[np.int64]:
    """Return which of `count` images contracts are tried on, in order."""
    order = np.random.default_rng(derive("contract")).permutation(count)
    return np.sort(order[:IMAGES])


def candidates(base: Contract, given: Mapping[str, Any], colours: int, own: Form) -> list[Contract]:
    """Return the contracts to try, each once.

    Args:
        base: with what is known.
        given: what the user has fixed; `mean` or `std` fixes both.
        colours: channels of an image.
        own: mean and deviation of the training images themselves, in `[0,1]`.
    """
    fixed = "mean" in given or "std" in given
    forms: Sequence[Form] = FORMS[:2] if fixed else [*FORMS, {"pixel_max": 1} | own]
    found = []
    for form in forms:
        if any(len(form.get(name, (0,))) not in (1, colours) for name in ("mean", "std")):
            continue
        for channels in ("rgb", "bgr") if colours == 3 else ("rgb",):
            # Mean and deviation stand in the model's order of channels.
            turned: Form = {
                name: value[::-1] if isinstance(value, tuple) and channels == "bgr" else value
                for name, value in form.items()
            }
            found.append(replace(base, **({"channels": channels} | turned | dict(given))))
    return list(dict.fromkeys(found))


def search(
    tried: Sequence[Contract], predict: Predict, labels: npt.NDArray[np.int64], classes: int
) -> Found:
    """Return the contract that is right on most images; one alone is only measured.

    Args:
        tried: to try, the plainest first.
        predict: gives the model's answers `[n]` under a contract.
        labels: the right ones, `[n]`.
        classes: how many there are.

    Raises:
        UserError: the best of several is no better than guessing.
    """
    right = []
    with Progress("trying input contracts", len(tried)) as progress:
        for contract in tried:
            right.append(predict(contract) == labels)
            progress.advance()
    counts = [int(each.sum()) for each in right]
    order = sorted(range(len(tried)), key=lambda at: -counts[at])  # stable: the plainest first
    best = order[0]
    chance = binomtest(counts[best], len(labels), 1 / classes, alternative="greater").pvalue
    if len(tried) > 1 and chance * len(tried) > CHANCE:
        raise UserError(
            f"the best of {len(tried)} input contracts ({tried[best]}) is right on "
            f"{counts[best]} of {len(labels)} clean images, which may be guessing",
            f"more than one in {classes}",
            "look at the order of the names in `labels`, or give `mean`, `std` and the others",
        )
    alike = [tried[at] for at in order[1:] if mcnemar(right[best], right[at])["p_value"] > ALIKE]
    return Found(tried[best], [(tried[at], counts[at]) for at in order], len(labels), alike)
