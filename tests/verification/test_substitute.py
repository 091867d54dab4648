"""The substitute: what it asks, that it learns, and that it repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from tests.verification.models import Linear, TorchEngine
from training.data.splits import Split
from training.models.bn_folding import folded
from training.models.build import build_members
from training.recipe import load_recipe
from verification.attacks.outcomes import Pixels
from verification.attacks.query_attack import Answers
from verification.substitute import MEMBERS, Substitute, ask_engine, steal

CONFIG = load_recipe("digits", {"width": 4, "members": 3, "seed": 7})
ENGINE = TorchEngine([Linear()])


def seeds(count: int, draw: int = 0) -> Split:
    """Images of 8x8 whose mean lies on either side of one half, and labels that nobody reads."""
    levels = torch.rand(count, generator=torch.Generator().manual_seed(draw))
    noise = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(draw + 1)) - 0.5
    images = (255 * (levels[:, None, None, None] + 0.2 * noise).clamp(0, 1)).to(torch.uint8)
    return Split(images, torch.full((count,), -1))


def stolen(answers: Answers, queries: int, held: Split, seed: int = 0) -> tuple[Substitute, Pixels]:
    asked: list[Pixels] = []

    def ask(images: Pixels) -> npt.NDArray[np.floating]:
        assert images.dtype == np.uint8
        asked.append(images)
        return ask_engine(ENGINE, answers)(images)

    found = steal(ask, held, CONFIG, classes=2, queries=queries, answers=answers, seed=seed)
    return found, np.concatenate(asked)


@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_it_learns_the_model_from_its_answers_alone(answers: Answers) -> None:
    found, asked = stolen(answers, 400, seeds(60))
    assert len(asked) == found.queries == 400
    assert (found.seeds, found.answers, found.architecture) == (60, answers, "resnet8")
    assert found.agreement(ENGINE, seeds(200, draw=5)) > 0.9
    held = {image.tobytes() for image in seeds(60).images.numpy()}
    assert {image.tobytes() for image in asked[:60]} == held
    assert not any(p.requires_grad for member in found.members for p in member.parameters())


def test_labels_alone_are_one_hot() -> None:
    images = seeds(8).images.numpy()
    told = ask_engine(ENGINE, "labels")(images)
    assert told.sum(1).tolist() == [1.0] * 8
    scores = ask_engine(ENGINE, "scores")(images)
    assert 0 < scores.min() < scores.max() < 1
    assert np.array_equal(told.argmax(1), scores.argmax(1))


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    one, again, other = (stolen("labels", 33, seeds(20), seed)[0] for seed in (0, 0, 1))
    assert one.queries == 33
    assert one.weights == again.weights != other.weights


def test_two_queries_are_enough_to_ask() -> None:
    found, asked = stolen("scores", 2, seeds(1))
    assert found.queries == len(asked) == 2


def test_it_begins_from_the_published_weights_that_the_model_began_from(tmp_path: Path) -> None:
    published, *_ = build_members(CONFIG, 3, [0.5], [0.25], "published")
    file = tmp_path / "published.safetensors"
    save_file(published.state_dict(), file)
    config = replace(CONFIG, start=str(file))
    found = steal(
        ask_engine(ENGINE, "scores"),
        seeds(60),
        config,
        classes=2,
        queries=240,
        answers="scores",
        seed=0,
    )
    assert found.gradients == (60 // 2 + 120 // 2) * MEMBERS  # of steps between rounds alone
    expected = folded(published).stages[0].state_dict()
    for member in found.members:
        own = member.stages[0].state_dict()
        assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert found.agreement(ENGINE, seeds(200, draw=5)) > 0.8
