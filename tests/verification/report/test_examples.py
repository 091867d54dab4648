"""Attacked images that a report keeps as pictures: chosen by the control's answers alone."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dverge_serve.engine.outputs import Scores
from training.data.splits import Split
from verification.attacks.outcomes import Outcomes
from verification.attacks.target import Target
from verification.report import examples as module
from verification.report.examples import examples

CLEAN = np.arange(8 * 3 * 8 * 8, dtype=np.uint8).reshape(8, 3, 8, 8)
ATTACKED = CLEAN ^ np.uint8(1)
LABELS = ("a", "b")


class Always:
    """A scorer with one answer to everything."""

    def __init__(self, answer: int) -> None:
        self._answer = answer

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        logits = np.zeros((len(images), 2), np.float32)
        logits[:, self._answer] = 1
        return Scores(logits, logits[:, None])


def outcome(broken: list[int], clean: list[int] | None = None) -> Outcomes:
    found = Outcomes(
        {}, np.isin(np.arange(8), range(8) if clean is None else clean), np.zeros(8, bool)
    )
    for eps in (0.1, 0.2, 0.3):
        found.worst[eps, "transfer"] = ATTACKED
        found.broken[eps, "transfer"] = np.isin(np.arange(8), broken if eps > 0.1 else [])
    return found


SPLIT = Split(torch.from_numpy(CLEAN), torch.zeros(8, dtype=torch.int64))
TARGETS = {"model": Target(Always(0), None), "control": Target(Always(1), None)}


def decoded(text: str) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image).transpose(2, 0, 1)


def test_the_first_images_that_fool_the_control_whatever_the_model_answers() -> None:
    outcomes = {"model": outcome([2, 5]), "control": outcome([1, 2, 5, 7], clean=[0, 2, 5, 7])}
    found = examples(outcomes, TARGETS, SPLIT, LABELS, [0.3, 0.1, 0.2])
    assert found is not None
    assert found["eps"] == 0.2, "the middle radius"
    for one, at in zip(found["images"], (2, 5, 7), strict=True):
        assert (one["label"], one["answer"], one["control_answer"]) == ("a", "a", "b")
        assert np.array_equal(decoded(one["clean"]), CLEAN[at])
        assert np.array_equal(decoded(one["attacked"]), ATTACKED[at])


def test_none_without_a_control_or_where_nothing_fools_it() -> None:
    untouched = {"model": outcome([]), "control": outcome([])}
    assert examples(untouched, TARGETS, SPLIT, LABELS, [0.1, 0.2]) is None
    alone = {"model": TARGETS["model"]}
    assert examples({"model": outcome([1])}, alone, SPLIT, LABELS, [0.1]) is None


def test_no_more_pictures_than_a_report_should_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"model": outcome([]), "control": outcome(list(range(8)))}
    found = examples(outcomes, TARGETS, SPLIT, LABELS, [0.2])
    assert found is not None
    assert len(found["images"]) == module.MOST
    size = len(found["images"][0]["clean"]) + len(found["images"][0]["attacked"])
    monkeypatch.setattr(module, "MOST_BYTES", 2 * size + size // 2)
    found = examples(outcomes, TARGETS, SPLIT, LABELS, [0.2])
    assert found is not None
    assert len(found["images"]) == 2
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    assert examples(outcomes, TARGETS, SPLIT, LABELS, [0.2]) is None
