"""Every method by its paper's equations, on tiny members; mixed and foreign architectures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config, tiny_images, tiny_members
from training.methods import adp, adversarial, dverge, gal
from training.models.build import build_members
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import SINGLE_PROCESS
from training.runs.directory import Run
from training.schedules import Adversarial, Dverge
from training.trainer import train

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 2, 3, 1])
SOURCE, TARGET = tiny_images(5), tiny_images(5, seed=1)
METHODS = ("standard", "adversarial", "dverge", "dverge+adversarial", "adp", "gal")


def sgd(members: list[Member]) -> list[torch.optim.SGD]:
    return [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]


def moved_by(members: list[Member], loss: Tensor) -> list[Tensor]:
    """What plain SGD of rate 0.1 makes of the members' parameters."""
    parameters = [parameter for member in members for parameter in member.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    return [(p - 0.1 * g).detach() for p, g in zip(parameters, gradients, strict=True)]


def expect(members: list[Member], wanted: list[Tensor]) -> None:
    found = [parameter for member in members for parameter in member.parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_adversarial_training_learns_from_each_members_own_pgd() -> None:
    members = tiny_members(2)
    settings = Adversarial(eps=0.1, step_size=0.03, steps=3)
    config = replace(tiny_config(), adversarial=settings, seed=7)
    made = []
    for index, member in enumerate(members):
        images = adversarial.adversarial_images(
            member, SOURCE, LABELS, settings, 7, "adversarial", 4, 2, index
        )
        member.eval()
        assert (images - SOURCE).abs().max() <= 0.1 + 1e-12
        assert F.cross_entropy(member(images), LABELS) > F.cross_entropy(member(SOURCE), LABELS)
        made.append(images)
        member.train()
    losses = [F.cross_entropy(m(x), LABELS) for m, x in zip(members, made, strict=True)]
    wanted = moved_by(members, torch.stack(losses).sum())
    again = tiny_members(2)
    step = adversarial.make_step(config, again, sgd(again), SINGLE_PROCESS)
    found = step(4, 2, (SOURCE, LABELS, SOURCE))
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], abs=1e-10)
    expect(again, wanted)


def test_dverge_with_adversarial_training_adds_the_members_own_loss() -> None:
    members, settings = tiny_members(2), Dverge(weight=0.5, steps=2)
    distilled = [
        dverge.distill(member, SOURCE, TARGET, layer=3, settings=settings) for member in members
    ]
    own = [(SOURCE + 0.01 * (index + 1)).clamp(0, 1) for index in range(2)]
    total = torch.zeros(())
    for index, member in enumerate(members):
        member.train()
        total = total + 0.5 * F.cross_entropy(member(distilled[1 - index]), LABELS)
        total = total + F.cross_entropy(member(own[index]), LABELS)
    wanted = moved_by(members, total)
    again = tiny_members(2)
    dverge.step(
        again,
        sgd(again),
        SOURCE,
        LABELS,
        TARGET,
        layer=3,
        settings=settings,
        adversary=lambda index, member: (own[index], LABELS),
    )
    expect(again, wanted)


def test_adp_terms_against_a_hand_made_ensemble() -> None:
    # Two members, three classes, label 0; the others' predictions are orthogonal: determinant 1.
    probabilities = torch.tensor([[[0.5, 0.5, 1e-30], [0.5, 1e-30, 0.5]]], dtype=torch.float64)
    entropy, diversity = adp.adp_terms(probabilities.log(), torch.tensor([0]))
    mean = [0.5, 0.25, 0.25]
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in mean))
    assert diversity.item() == pytest.approx(0, abs=1e-5)
    same = probabilities[:, :1].expand(-1, 2, -1)
    _, collapsed = adp.adp_terms(same.log(), torch.tensor([0]))
    assert collapsed.item() == pytest.approx(math.log(2e-6), abs=1e-3)  # only the ridge is left


def test_adp_step_follows_equation_5() -> None:
    members = tiny_members(3)
    logits = torch.stack([member.train()(SOURCE) for member in members], 1)
    softmax = logits.softmax(2)
    mean = softmax.mean(1)
    total = torch.stack([F.cross_entropy(logits[:, k], LABELS) for k in range(3)]).sum()
    for row in range(5):
        keep = [c for c in range(4) if c != LABELS[row]]
        columns = torch.stack(
            [softmax[row, k, keep] / softmax[row, k, keep].norm() for k in range(3)], 1
        )
        determinant = torch.linalg.det(columns.T @ columns + 1e-6 * torch.eye(3))
        entropy = -(mean[row] * mean[row].log()).sum()
        total = total - (2.0 * entropy + 0.5 * determinant.log()) / 5
    wanted = moved_by(members, total)
    again = tiny_members(3)
    step = adp.make_step(tiny_config(members=3), again, sgd(again), SINGLE_PROCESS)
    losses = step(0, 0, (SOURCE, LABELS, SOURCE))
    own = [F.cross_entropy(logits[:, k], LABELS).item() for k in range(3)]
    assert losses.tolist() == pytest.approx(own, abs=1e-10)
    expect(again, wanted)


def test_gal_term_of_aligned_and_opposed_gradients() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert gal.gal_term([one, one * 3]).item() == pytest.approx(1.0)
    assert gal.gal_term([one, -one]).item() == pytest.approx(-1.0)
    three = gal.gal_term([one, one, -one])
    assert three.item() == pytest.approx(math.log(math.e + 2 / math.e), abs=1e-6)


def test_gal_step_follows_its_equation() -> None:
    members = tiny_members(2)
    x = SOURCE.clone().requires_grad_()
    losses = [F.cross_entropy(member.train()(x), LABELS) for member in members]
    gradients = [torch.autograd.grad(loss, x, create_graph=True)[0] for loss in losses]
    cosine = torch.stack(
        [
            (a * b).sum() / (a.norm() * b.norm())
            for a, b in zip(gradients[0], gradients[1], strict=True)
        ]
    )
    wanted = moved_by(members, (losses[0] + losses[1]) / 2 + 0.5 * cosine.mean())
    again = tiny_members(2)
    step = gal.make_step(tiny_config(), again, sgd(again), SINGLE_PROCESS)
    found = step(0, 0, (SOURCE, LABELS, SOURCE))
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], abs=1e-10)
    expect(again, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_through_the_same_command(method: str, tmp_path: Path) -> None:
    config = tiny_config(method=method, adversarial__epochs=2, adp__epochs=2, gal__epochs=2)
    config = config.overridden({"adversarial.steps": 2})
    run = train(config, tmp_path / "run", device=CPU)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    names = {json.loads(line)["stage"] for line in lines}
    second = {"standard": set(), "dverge+adversarial": {"dverge"}}.get(method, {method})
    assert names == {"standard"} | second
    standard, finished = run.members("standard"), run.members()
    changed = any(
        not torch.equal(one, other)
        for one, other in zip(
            standard[0].state_dict().values(), finished[0].state_dict().values(), strict=True
        )
    )
    assert changed == (method != "standard")


def test_methods_without_a_standard_start_begin_from_new_weights(tmp_path: Path) -> None:
    config = tiny_config(method="adp", adp__epochs=1, adp__lr=1e-12)
    run = train(config, tmp_path / "run", device=CPU)
    stem = "stages.0.conv.weight"
    standard = run.members("standard")[0].state_dict()[stem]
    finished = run.members()[0].state_dict()[stem]
    assert (standard - finished).abs().max() > 0.05


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11_bn", "convnext_tiny"])
def test_torchvision_members_show_every_layer_and_compute_nothing_past_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour = {"data__name": "svhn", "data__mode": "RGB", "data__crop": [32, 32]}
    config = tiny_config(architecture=f"torchvision:{name}", **colour)
    member = build_members(config, 4, [0.5] * 3, [0.2] * 3)[0].eval()
    monkeypatch.delattr(fx.Tracer, "trace")  # from now on, with threads about
    images, copy = torch.rand(2, 3, 32, 32), member.frozen()
    whole = member(images)
    assert torch.equal(member(images, member.depth), whole)
    for layer in sorted({1, member.depth // 2, member.depth - 1}):
        inside = list(map(id, member.modules_upto(layer)))
        assert len(set(inside)) == len(inside)
        head = [m for m in member.modules() if isinstance(m, nn.Linear)][-1]
        assert id(head) not in inside
        features = member(images, layer)
        assert len(features) == 2
        assert features.min() < 0  # before the activation
        assert torch.allclose(copy(images, layer), features, atol=1e-4)
    assert torch.allclose(copy(images), whole, atol=1e-4)


def test_torchvision_members_follow_the_mode_at_every_layer() -> None:
    config = tiny_config(architecture="torchvision:resnet18")
    member = build_members(config, 4, [0.5], [0.2])[0].eval()
    images = torch.rand(4, 1, 32, 32)
    quiet = member(images, 3)
    member.train()
    assert not torch.allclose(member(images, 3), quiet)
    member.eval()
    assert not torch.equal(member(images, 3), quiet)  # training moved the running statistics


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_members_distil_what_they_would_without_a_frozen_copy(name: str) -> None:
    config = tiny_config(architecture=f"torchvision:{name}")
    member = build_members(config, 4, [0.5], [0.2])[0]
    member.double()(SOURCE)
    settings, deep = Dverge(steps=2), member.depth
    made = []
    for layer in (1, deep // 2, deep):
        made.append(dverge.distill(member, SOURCE, TARGET, layer=layer, settings=settings))
        expected = dverge._distill(member.eval(), SOURCE, TARGET, layer, settings)
        torch.testing.assert_close(made[-1], expected, rtol=0, atol=1e-9)
    assert not torch.equal(made[0], made[1])
    member.train()(SOURCE)  # learns: the copy of before is brought up to date
    again = dverge.distill(member, SOURCE, TARGET, layer=deep // 2, settings=settings)
    assert not torch.equal(again, made[1])


def test_an_ensemble_of_different_architectures_trains(tmp_path: Path) -> None:
    config = tiny_config(architecture=["resnet8", "resnet14"], dverge__epochs=4)
    run = train(config, tmp_path / "run", device=CPU)
    assert [member.depth for member in run.members()] == [8, 14]


def test_the_layer_is_drawn_as_a_share_of_each_members_depth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(architecture=["resnet8", "resnet20"])
    members = build_members(config, 4, [0.5], [0.2])
    seen: list[tuple[int, int]] = []

    def distill(
        member: Member, source: Tensor, target: Tensor, layer: int, settings: Dverge
    ) -> Tensor:
        seen.append((member.depth, layer))
        return source

    monkeypatch.setattr(dverge, "_distill", distill)
    images = SOURCE.float()
    for layer in (1, 10, 20):
        dverge.step(members, sgd(members), images, LABELS, images, layer=layer, settings=Dverge())
    assert sorted(seen) == [(8, 1), (8, 4), (8, 8), (20, 1), (20, 10), (20, 20)]


def test_wrong_architectures_are_refused() -> None:
    with pytest.raises(UserError, match="one name, or 2"):
        tiny_config(architecture=["resnet8"])
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_members(tiny_config(architecture="torchvision:resnet19"), 4, [0.5], [0.2])
    with pytest.raises(UserError, match="6n\\+2"):
        build_members(tiny_config(architecture="resnet9"), 4, [0.5], [0.2])


def test_side_by_side_keeps_order_and_passes_errors_on() -> None:
    assert side_by_side(lambda item: item * 2, range(7), CPU) == [0, 2, 4, 6, 8, 10, 12]

    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        side_by_side(fail, range(3), CPU)


def test_a_standard_run_loads_back(tmp_path: Path) -> None:
    config = tiny_config(method="standard", members=1)
    found = Run.open_finished(train(config, tmp_path / "run", device=CPU).path)
    assert len(found.members()) == 1
    last = json.loads((found.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.checkpoint["holdout_accuracy"] == last["holdout_accuracy"]
