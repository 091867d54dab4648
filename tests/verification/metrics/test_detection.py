"""Detection by disagreement, and the members' matrices, where the answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.images import to_float
from tests.verification.models import Linear, TorchEngine, linear_split
from training.data.splits import Split
from training.methods.diversity import diversity
from training.models.member import Member
from training.schedules import Dverge
from verification.metrics import detection
from verification.metrics.transferability import transferability


def scores(*members: list[float]) -> Scores:
    stack = np.log(np.array([members], np.float32))
    return Scores(stack.mean(1), stack)


def test_scores_are_zero_where_members_agree_and_known_where_they_do_not() -> None:
    same = scores([0.9, 0.1], [0.9, 0.1])
    apart = scores([0.9, 0.1], [0.2, 0.8])
    assert detection.vote_split(same).tolist() == [0]
    assert detection.vote_split(apart).tolist() == [0.5]
    assert detection.mean_kl(same)[0] == pytest.approx(0, abs=1e-6)
    forth = 0.9 * np.log(0.9 / 0.2) + 0.1 * np.log(0.1 / 0.8)
    back = 0.2 * np.log(0.2 / 0.9) + 0.8 * np.log(0.8 / 0.1)
    assert detection.mean_kl(apart)[0] == pytest.approx((forth + back) / 2, rel=1e-5)
    own = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    other = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert detection.member_entropy(apart)[0] == pytest.approx((own + other) / 2, rel=1e-5)


def test_the_attackers_divergence_is_the_deployed_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 7, 5, dtype=torch.float64) * 4
    found = detection._divergence(stack).numpy()
    logits = stack.numpy().transpose(1, 0, 2).astype(np.float32)
    np.testing.assert_allclose(found, Scores(logits.mean(1), logits).disagreement, atol=1e-6)


def test_the_threshold_is_exceeded_by_one_in_twenty() -> None:
    torch.manual_seed(0)
    holdout = Split(
        torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8), torch.zeros(200).long()
    )
    members: list[torch.nn.Module] = [Linear(20), Linear(-30)]
    engine: Any = TorchEngine(members)
    found = detection.calibrate(engine, holdout, holdout)
    scored = engine.run_all(to_float(holdout.images.numpy()))
    assert 0.04 <= (scored.disagreement > found["threshold"]).mean() <= 0.05
    assert found["calibration_images"] == 200
    assert found["measured_false_positive_rate"]["value"] <= 0.05


class Corner(Linear):
    """Looks at the first pixel as well, so that members can be made to disagree."""

    def __init__(self, weight: float) -> None:
        super().__init__(20.0)
        self.weight = weight

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return super().score(x) + self.weight * (x[:, 0, 0, 0] - 0.5)


def test_the_detector_aware_attacker_still_fools_and_hides_better() -> None:
    members: list[torch.nn.Module] = [Corner(6.0), Corner(-6.0)]
    engine: Any = TorchEngine(members)
    split = linear_split([120, 124, 131, 135])
    eps = 0.1
    pixels = detection.detector_aware(members, split, eps, steps=20, seed=0)
    assert np.abs(pixels.astype(int) - split.images.numpy()).max() <= 25
    aware = engine.run_all(to_float(pixels))
    assert (aware.predictions != split.labels.numpy()).all()
    blunt = split.images.numpy().astype(int) + np.where(split.labels == 1, -25, 25).reshape(
        -1, 1, 1, 1
    )
    blunt[:, 0, 0, 0] = 255  # an attack that ignores the disagreement it causes
    loud = engine.run_all(to_float(blunt.astype(np.uint8)))
    assert aware.disagreement.mean() < 0.2 * loud.disagreement.mean()
    rows = detection.measure(
        engine, split, split, {"loud": (eps, blunt.astype(np.uint8)), "aware": (eps, pixels)}
    )
    found = {(row["attack"], row["score"]): row["auroc"]["value"] for row in rows}
    assert found["loud", "jensen-shannon"] > found["aware", "jensen-shannon"]
    assert {row["score"] for row in rows} == set(detection.SCORES)


class Stage(torch.nn.Module):
    """A one-stage member that answers by one pixel."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = 20 * (x.flatten(1)[:, self.pixel] - 0.5)
        logits = torch.stack([-score, score], 1)
        return logits, logits


def test_members_that_share_nothing_do_not_fool_one_another() -> None:
    members = [Member([Stage(pixel)], [0.0], [1.0]) for pixel in (0, 5)]
    split = linear_split([118, 122, 130, 140])
    found = transferability(members, split, 0.1, seed=0)
    (own, other, _), (_, own_too, _) = found["success"]
    assert (own, own_too) == (1.0, 1.0)
    assert other < 1.0
    same = [Member([Stage(0)], [0.0], [1.0]) for _ in range(2)]
    shared = transferability(same, split, 0.1, seed=0)
    assert shared["success"] == [[1.0] * 3] * 2
    # Distilled into another class: a member that looks elsewhere still sees the source image.
    settings, far = Dverge(eps=0.8, step_size=0.02, steps=40), linear_split([51] * 4 + [204] * 4)
    apart = diversity(members, far, settings, 0)
    together = diversity(same, far, settings, 0)
    assert apart["nats"][0][0] is None
    assert apart["nats"][0][1] == apart["nats"][1][0]
    assert apart["nats"][0][1] > together["nats"][0][1]
