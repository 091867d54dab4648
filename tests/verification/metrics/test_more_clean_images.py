from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dverge_serve.engine.outputs import Scores
from training.config import Data
from training.data.splits import load_test
from verification.attacks.target import Target
from verification.metrics import more_clean_images as module
from verification.metrics.more_clean_images import more_clean_images

EVERY = 4  # of the images is answered wrongly, or not at all


class Engine:
    """Knows each image's class, and is wrong where told."""

    def __init__(self, wrong: float) -> None:
        _, whole = load_test(Data(name="digits", mode="L", crop=(8, 8)))
        self.known = {
            image.numpy().tobytes(): int(label)
            for image, label in zip(whole.images, whole.labels, strict=True)
        }
        self.wrong = wrong

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        pixels = np.rint(images * 255).astype(np.uint8)
        logits = np.eye(10, dtype=np.float32)[[self.known[each.tobytes()] for each in pixels]]
        logits[::EVERY] *= self.wrong
        return Scores(logits, logits[:, None])


def of(limit: int, own: int = 0) -> Any:
    """Return what a verification of so many images knows, `own` the recipe's limit."""
    data = Data(name="digits", mode="L", crop=(8, 8), test_limit=limit)
    training = SimpleNamespace(data=replace(data, test_limit=own))
    return SimpleNamespace(attacked=data, split=load_test(data)[1], training=training)


@pytest.mark.parametrize("wrong", [-1, np.nan])
def test_more_images_are_answered_than_are_attacked(wrong: float) -> None:
    target = Target(engine=Engine(wrong), members=None)
    found = more_clean_images(of(50), {"model": target})
    assert found is not None
    assert found["control"] is None
    assert found["model"]["n"] == 360
    assert found["model"]["value"] == 1 - 1 / EVERY
    both = more_clean_images(of(50), {"model": target, "control": target})
    assert both == {"model": found["model"], "control": found["model"]}


def test_as_many_as_memory_and_time_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 80)
    found = more_clean_images(of(40), {"model": Target(engine=Engine(-1), members=None)})
    assert found is not None
    assert found["model"]["n"] == 80


def test_no_more_than_the_recipe_allows() -> None:
    found = more_clean_images(of(40, own=100), {"model": Target(engine=Engine(-1), members=None)})
    assert found is not None
    assert found["model"]["n"] == 100


@pytest.mark.parametrize("limit", [0, 360, 1000])
def test_nothing_where_all_were_attacked(limit: int) -> None:
    assert more_clean_images(of(limit), {}) is None
