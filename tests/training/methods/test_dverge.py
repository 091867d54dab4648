"""DVERGE against its oracle: the literal transcription in `reference.py`, in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from tests.training.methods import reference
from tests.training.networks import DEPTH, tiny_config, tiny_images, tiny_members
from training.methods import dverge, standard
from training.methods.dverge_draws import all_others, draw_partners
from training.models.member import Member
from training.parallel.topology import SINGLE_PROCESS
from training.schedules import Dverge

TOLERANCE = 1e-8
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-3
SOURCE, TARGET = tiny_images(5), tiny_images(5, seed=1)
LABELS = torch.tensor([0, 3, 1, 2, 0])
Norm = Literal["batch", "running"]


def settings(batchnorm: Norm) -> Dverge:
    return Dverge(eps=0.07, step_size=0.011, steps=10, decay=1.0, batchnorm=batchnorm)


def optimizers(members: Sequence[Member]) -> list[SGD]:
    return [
        SGD(member.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for member in members
    ]


def descents_of(members: Sequence[Member]) -> list[reference.Descent]:
    return [
        reference.Descent(reference.Network(member.state_dict()), LR, MOMENTUM, WEIGHT_DECAY)
        for member in members
    ]


def expect_equal(member: Member, network: reference.Network) -> None:
    state = member.state_dict()
    assert state.keys() == network.tensors.keys()
    for name, tensor in state.items():
        expected = network.tensors[name]
        assert float((tensor - expected).abs().max()) <= TOLERANCE, name


@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
@pytest.mark.parametrize("batchnorm", ["batch", "running"])
def test_distilled_images_equal_the_literal_loop(layer: int, batchnorm: Norm) -> None:
    (member,) = tiny_members(1)
    network = reference.Network(member.state_dict())
    chosen = settings(batchnorm)

    found = dverge.distill(member, SOURCE, TARGET, layer=layer, settings=chosen)

    expected = reference.distill(
        network,
        SOURCE,
        TARGET,
        layer=layer,
        eps=chosen.eps,
        step_size=chosen.step_size,
        steps=chosen.steps,
        decay=chosen.decay,
        batchnorm=batchnorm,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    expect_equal(member, network)
    assert not torch.equal(found, SOURCE)


@pytest.mark.parametrize("layer", [1, 4, 8])
@pytest.mark.parametrize("batchnorm", ["batch", "running"])
def test_one_step_after_another_equals_the_literal_procedure(batchnorm: Norm, layer: int) -> None:
    """The second at another layer, with momentum; every layer's first is in `test_oracle`."""
    members = tiny_members(2)
    descents = descents_of(members)
    steps, chosen = optimizers(members), settings(batchnorm)
    for source, target, drawn in ((SOURCE, TARGET, layer), (TARGET, SOURCE, DEPTH + 1 - layer)):
        losses = dverge.step(members, steps, source, LABELS, target, layer=drawn, settings=chosen)
        expected, _ = reference.dverge_step(
            descents,
            source,
            LABELS,
            target,
            layer=drawn,
            eps=chosen.eps,
            step_size=chosen.step_size,
            steps=chosen.steps,
            decay=chosen.decay,
            batchnorm=batchnorm,
        )
        assert losses.tolist() == pytest.approx(expected, abs=TOLERANCE)
        assert not losses.requires_grad
    for member, descent in zip(members, descents, strict=True):
        expect_equal(member, descent.network)


def test_a_standard_step_is_sgd_on_the_clean_images_of_each_member_alone() -> None:
    members = tiny_members(2)
    descents = descents_of(members)
    step = standard.make_step(tiny_config(), members, optimizers(members), SINGLE_PROCESS)
    for source in (SOURCE, TARGET):
        losses = step(0, 0, (source, LABELS, source))
        expected = [descent.step([(source, 1.0)], LABELS) for descent in descents]
        assert losses.tolist() == pytest.approx(expected, abs=TOLERANCE)
    for member, descent in zip(members, descents, strict=True):
        expect_equal(member, descent.network)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_distillation_with_other_momentum_and_fewer_steps(decay: float) -> None:
    (member,) = tiny_members(1)
    network = reference.Network(member.state_dict())
    chosen = replace(settings("running"), decay=decay, steps=3, step_size=0.05)
    found = dverge.distill(member, SOURCE, TARGET, layer=3, settings=chosen)
    expected = reference.distill(
        network,
        SOURCE,
        TARGET,
        layer=3,
        eps=0.07,
        step_size=0.05,
        steps=3,
        decay=decay,
        batchnorm="running",
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def distance(member: Member, images: Tensor, layer: int) -> Tensor:
    with torch.no_grad():
        apart: Tensor = member(images, layer) - member(TARGET, layer)
        return apart.pow(2).flatten(1).sum(1)


@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
def test_distilled_images_come_nearer_to_the_target_inside_the_ball(layer: int) -> None:
    (member,) = tiny_members(1)
    member.eval()
    chosen = settings("running")
    before = {name: tensor.clone() for name, tensor in member.state_dict().items()}
    found = dverge.distill(member, SOURCE, TARGET, layer=layer, settings=chosen)
    assert (found - SOURCE).abs().max() <= chosen.eps + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1
    assert bool((distance(member, found, layer) < distance(member, SOURCE, layer)).all())
    assert all(torch.equal(before[name], now) for name, now in member.state_dict().items())
    assert all(parameter.grad is None for parameter in member.parameters())


def test_batch_statistics_move_at_every_step_up_to_the_layer_and_not_past_it() -> None:
    (member,) = tiny_members(1)
    before = copy.deepcopy(member)
    dverge.distill(member, SOURCE, TARGET, layer=4, settings=settings("batch"))
    for name, tensor in member.state_dict().items():
        stage = int(name.split(".")[1]) if name.startswith("stages.") else 0
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == (20 if stage < 4 else 0), name  # images and target, ten times
        elif "running" in name:
            assert torch.equal(tensor, before.state_dict()[name]) == (stage >= 4), name
        else:
            assert torch.equal(tensor, before.state_dict()[name]), name
    momenta = [m.momentum for m in member.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert momenta == [reference.BN_MOMENTUM] * len(momenta)


def test_a_members_loss_is_the_sum_over_the_others_or_an_estimate_of_it() -> None:
    (member,) = tiny_members(1)
    member.eval()
    others = [tiny_images(5, seed=3), tiny_images(5, seed=4)]
    with torch.no_grad():
        whole = dverge.member_loss(member, others, LABELS, 2)
        drawn = [dverge.member_loss(member, [images], LABELS, 2) for images in others]
        parts = [torch.nn.functional.cross_entropy(member(images), LABELS) for images in others]
    assert float(whole) == pytest.approx(float(parts[0] + parts[1]), abs=1e-12)
    assert float(sum(drawn)) / 2 == pytest.approx(float(whole), abs=1e-12)


@pytest.mark.parametrize("partners", [1, 2, 3])
def test_partners_are_derangements_and_all_pairs_are_as_likely(partners: int) -> None:
    config = tiny_config(members=5, dverge__partners=partners)
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(400):
        drawn = draw_partners(config, 0, number)
        for index, others in enumerate(drawn):
            assert index not in others
            assert len(set(others)) == partners
            pairs.update((index, other) for other in others)
        used = Counter(other for others in drawn for other in others)
        assert set(used.values()) == {partners}, "each member's images are used equally often"
    expected = 400 * partners / 4
    assert len(pairs) == 20
    assert all(abs(count - expected) < 5 * expected**0.5 for count in pairs.values())


@pytest.mark.parametrize("partners", [0, 4, 9])
def test_no_partners_or_enough_of_them_are_all_the_others(partners: int) -> None:
    config = tiny_config(members=5, dverge__partners=partners)
    assert draw_partners(config, 3, 7) == all_others(5)


def test_a_member_learns_from_its_partners_alone() -> None:
    members, alone = tiny_members(3), tiny_members(3)
    source, target = tiny_images(5, seed=5), tiny_images(5, seed=6)
    partners = [[1], [2], [0]]
    made = dverge.distill_all(alone, source, target, layer=3, settings=settings("running"))
    losses = dverge.step(
        members,
        [torch.optim.SGD(member.parameters(), lr=0.1) for member in members],
        source,
        LABELS,
        target,
        layer=3,
        settings=settings("running"),
        partners=partners,
    )
    for index, (member, (other,)) in enumerate(zip(alone, partners, strict=True)):
        member.train()
        expected = dverge.member_loss(member, [made[other]], LABELS, 2).detach()
        assert float(losses[index]) == pytest.approx(float(expected), abs=1e-12)
