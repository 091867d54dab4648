"""Batches in threads: adversarial images depend neither on threads nor on other images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.verification.models import linear_split
from training.data.splits import Split, to_float
from training.models.bn_folding import folded
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages
from verification.attacks.batches import LARGEST, batch_size, in_batches, in_slices, spread
from verification.attacks.gradient_attack import GradientAttack
from verification.gradients import _Shared

ATTACK = GradientAttack(
    name="all of it",
    threat="white_box",
    source="target",
    loss="cw",
    steps=3,
    momentum=1.0,
    diversity=0.5,
    skip_gamma=0.2,
    variance_samples=2,
)


def network(seed: int) -> Member:
    torch.manual_seed(seed)
    return folded(Member(resnet_stages("resnet8", 3, 8, 4), [0.5] * 3, [0.25] * 3))


def pictures(count: int) -> Split:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, 12, 12), generator=draw, dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 4)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_image_is_worked_on_once_and_in_order() -> None:
    split = linear_split(list(range(2 * LARGEST["cpu"] + 5)))
    found = in_batches(lambda part, start: (start, part.images[:, 0, 0, 0].tolist()), split)
    assert len(found) == 4
    assert all(start == values[0] for start, values in found)
    assert [value for _, values in found for value in values] == list(range(len(split)))


@given(st.integers(0, 5000), st.integers(1, 600))
def test_batches_are_few_alike_and_even(count: int, largest: int) -> None:
    size = batch_size(count, largest)
    assert 1 <= size <= largest
    batches = -(-count // size)
    assert batches <= -(-count // largest) + 1
    assert batches <= 1 or batches % 2 == 0 or batches * (batches + 1) > count


def test_threads_change_no_bit_of_an_attack(threads: Callable[[int], None]) -> None:
    model, split = Ensemble([network(1), network(2)]), pictures(LARGEST["cpu"] + 9)
    images, made = to_float(split.images), []
    for count in (1, 2, 3):
        threads(count)
        made.append(ATTACK.run(model, images, split.labels, 0.05, 0, "x").images)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    other = ATTACK.run(model, images, split.labels, 0.05, 1, "x").images
    assert not torch.equal(made[0], other)


def test_batches_run_at_the_same_time(threads: Callable[[int], None]) -> None:
    threads(2)
    meeting = threading.Barrier(2, timeout=60)  # each waits for the other: alone, it would break
    found = in_batches(lambda part, start: meeting.wait(), pictures(LARGEST["cpu"] + 1))
    assert sorted(found) == [0, 1]


def test_a_single_batch_of_small_images_has_one_thread_and_one_of_large_images_has_all(
    threads: Callable[[int], None],
) -> None:
    threads(2)

    def inside(size: int) -> list[int]:
        like = torch.zeros(1, 3, size, size)
        return in_slices(lambda part: torch.get_num_threads(), LARGEST["cpu"], like)

    assert (inside(64), inside(65)) == ([1], [2])
    assert torch.get_num_threads() == 2


def test_one_graph_behind_several_members_keeps_threads_apart(
    threads: Callable[[int], None],
) -> None:
    threads(2)
    meeting = threading.Barrier(2, timeout=60)

    class Graph(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
            logits = images.mean((1, 2, 3))[:, None, None].expand(-1, 2, 3)
            meeting.wait()  # both threads are here before either returns
            return None, logits

    shared = _Shared(Graph())
    split = pictures(LARGEST["cpu"] + 1)
    found = in_batches(lambda part, start: shared(part.images.float()), split)
    expected = split.images.float().mean((1, 2, 3))
    torch.testing.assert_close(torch.cat(found)[:, 0, 0], expected)


@pytest.mark.parametrize(
    ("most", "rows"),
    [((3,), [0, 2, 4]), ((4, 2), [0, 4]), ((0, 9), [0, 1, 2, 3, 4]), ((), [0, 1, 2, 3, 4])],
)
def test_images_are_evenly_spaced_and_no_more_than_any_limit(
    most: tuple[int, ...], rows: list[int]
) -> None:
    assert spread(pictures(5), *most).tolist() == rows
