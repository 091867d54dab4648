"""Auto-PGD: its checkpoints, what it finds, what it costs, and rounds of it in a suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dverge_serve.progress import Progress
from tests.verification.models import EPS, VALUES, Linear, TorchEngine, linear_split
from training.data.splits import to_float
from training.pgd import Norm, cross_entropy, pgd_loop, random_start
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.apgd import AdaptivePGD, ApgdLoss, checkpoints
from verification.attacks.presets import Variant, suite
from verification.attacks.rounds import later_rounds, searches
from verification.attacks.suite import run_suite
from verification.attacks.target import Target

HILL_EPS = 0.014
APGD = AdaptivePGD(name="apgd", threat="white_box", source="target", steps=20)


class Counting(nn.Module):
    """A model that counts the images it is shown with gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x) if x.requires_grad else 0
        found: Tensor = self.model(x)
        return found


class Hills(nn.Module):
    """Two classes, four scores: random waves, so that the losses have many local maxima."""

    def __init__(self) -> None:
        super().__init__()
        draw = generator("hills")
        self.waves = torch.randn(40, 16, generator=draw) * 6
        self.heads = torch.randn(4, 40, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.waves.T) @ self.heads.T


def hills(count: int = 80) -> tuple[Hills, Tensor, Tensor]:
    """The model, 8-bit images, and its own answers as the labels."""
    model = Hills()
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator("x"))
    with torch.no_grad():
        return model, to_float(pixels), model(to_float(pixels)).argmax(1)


def broken(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) != labels).sum())


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr", "targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_breaks_what_can_be_broken_and_stays_in_the_ball(norm: Norm, loss: ApgdLoss) -> None:
    model, split = Linear(classes=4), linear_split([120, 135, 141, 60, 250])
    images, eps = to_float(split.images), EPS if norm == "linf" else 8 * EPS
    attack = replace(APGD, norm=norm, loss=loss, nearest_steps=20)
    found = attack(model, images, split.labels, eps)
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert float(size.max()) <= eps + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    wrong = (model(found).argmax(1) != split.labels).tolist()
    assert wrong == [True, True, False, False, False]
    assert torch.equal(found, attack(model, images, split.labels, eps))


def test_an_image_found_is_on_the_8_bit_grid_where_that_suffices() -> None:
    # 12 whole steps fit into the ball of 12.75: 140 breaks as a float alone.
    split = linear_split([135, 140])
    found = APGD(Linear(), to_float(split.images), split.labels, EPS) * 255
    assert torch.equal(found[0].round(), found[0])
    assert broken(Linear(), found / 255, split.labels) == 2
    assert float(found[1].mean()) == pytest.approx(140 - 12.75, abs=1e-3)


def test_images_that_are_done_cost_nothing_more() -> None:
    split = linear_split([130, 131, 250, 0])
    model = Counting(Linear())
    APGD(model, to_float(split.images), split.labels, EPS)
    # Two images stand through all steps; the others fall at the first step, or the start.
    assert 2 * APGD.steps <= model.seen <= 2 * APGD.steps + 4
    longer = Counting(Linear())
    replace(APGD, nearest_steps=50)(longer, to_float(split.images), split.labels, EPS)
    assert longer.seen == model.seen + 50  # one of the two goes on: a quarter, rounded up


def test_outputs_that_are_not_finite_are_no_success() -> None:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.where(x.mean((1, 2, 3)) < 0.5, torch.nan, 0)[:, None]

    split = linear_split([130])
    found = APGD(Broken(), to_float(split.images), split.labels, EPS)
    assert found.isfinite().all()
    assert broken(Broken(), found, split.labels) == 0


def test_it_climbs_higher_than_steps_of_one_size() -> None:
    model, images, labels = hills()
    start = random_start(images, HILL_EPS, generator("start"))
    loss, size = cross_entropy(model, labels), HILL_EPS / 5
    plain = pgd_loop(loss, images, eps=HILL_EPS, step_size=size, steps=40, start=start)
    found = replace(APGD, steps=40)(model, images, labels, HILL_EPS)
    assert broken(model, found, labels) >= broken(model, plain, labels) > 60
    with torch.no_grad():
        ours, theirs = (losses.margins(model(each), labels) for each in (found, plain))
    standing = (theirs <= 0) & (ours <= 0)
    assert standing.sum() > 5
    assert ours[standing].mean() > theirs[standing].mean() + 0.1


def test_more_targets_find_more() -> None:
    model, images, labels = hills()
    attacks = [replace(APGD, steps=10, loss="targeted", targets=count) for count in (1, 3)]
    one, three = (
        broken(model, attack(model, images, labels, HILL_EPS), labels) for attack in attacks
    )
    assert three > one > 60


def test_rounds_go_on_until_a_cycle_breaks_almost_nothing() -> None:
    chosen = [attack for attack in suite(Variant(preset="quick", classes=2), []) if attack.gate]
    ordinary = replace(APGD, name="not a round", steps=2)
    target = Target(TorchEngine([Linear()]), [Linear()])
    outcome = run_suite(
        [*chosen, ordinary], {}, {"m": target}, linear_split(VALUES), [EPS], seed=0
    )["m"]
    first, second, third, *rest = searches(chosen)["apgd"]
    # The first round breaks all there is: the cycle of the second and third breaks nothing.
    assert all(outcome.has(attack, EPS) for attack in (first, second, third, ordinary))
    assert not any(outcome.has(attack, EPS) for attack in rest)  # not run
    assert outcome.ran[first.name, EPS].all()
    left = outcome.robust([first], EPS)
    assert not left.all()
    assert outcome.ran[second.name, EPS].tolist() == left.tolist()


def test_rounds_that_will_hardly_be_run_are_no_work_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    totals = []

    class Counting(Progress):
        def __init__(self, label: str, total: int) -> None:
            totals.append(total)
            super().__init__(label, total)

        def __exit__(self, *ended: Any) -> None:
            super().__exit__(*ended)
            assert self._done == self._total

    monkeypatch.setattr("verification.attacks.suite.Progress", Counting)
    chosen = [attack for attack in suite(Variant(preset="quick", classes=2), []) if attack.gate]
    later = later_rounds(chosen)
    few = [attack for attack in chosen if attack not in later]
    for each in (chosen, few):
        target = Target(TorchEngine([Linear()]), [Linear()])
        run_suite(each, {}, {"m": target}, linear_split(VALUES), [EPS], seed=0)
    assert totals[0] - totals[1] == sum(each.restarts for each in later) < totals[1] / 5
