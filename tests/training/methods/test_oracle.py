"""Whole steps of DVERGE, as a run takes them, against the literal procedure in `reference.py`.

The product's side is `training.methods`: the layer it draws, BatchNorm folded where
statistics stand still, members side by side. Float64 first, where both must agree to the last
digits that matter; then float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from tests.training.methods import reference
from tests.training.networks import DEPTH, tiny_images, tiny_members
from training.config import Config, Data
from training.methods import adversarial, dverge, stages
from training.methods.dverge_draws import draw_layer
from training.models.member import Member
from training.schedules import Adversarial, Dverge
from training.seeds import generator

TOLERANCE = 1e-8
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-3
Norm = Literal["batch", "running"]
PGD: dict[str, Any] = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 3}


@dataclass(frozen=True)
class Compared:
    """One step, as the product and as the reference made it."""

    losses: Tensor
    expected_losses: Tensor
    images: list[Tensor]
    expected_images: list[Tensor]
    members: list[Member]
    networks: list[reference.Network]


def config(count: int, batchnorm: Norm, *, attacked: bool, steps: int) -> Config:
    return Config(
        name="oracle",
        method="dverge+adversarial" if attacked else "dverge",
        architecture="resnet8",
        width=8,
        members=count,
        data=Data(mode="L", crop=(8, 8)),
        dverge=Dverge(eps=0.07, step_size=0.011, steps=steps, weight=0.7, batchnorm=batchnorm),
        adversarial=Adversarial(**PGD),
    )


def epoch_of(layer: int, chosen: Config) -> int:
    """Return the first epoch for which a run draws `layer`."""
    return next(epoch for epoch in range(1000) if draw_layer(chosen, DEPTH, epoch) == layer)


def compared(
    chosen: Config,
    layer: int,
    batch: Sequence[Tensor],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> Compared:
    """Let both take one step from the same state with the same images and noise."""
    source, labels, target = (t.to(dtype) if t.is_floating_point() else t for t in batch)
    members = [member.to(dtype) for member in tiny_members(chosen.members)]
    descents = [
        reference.Descent(reference.Network(member.state_dict()), LR, MOMENTUM, WEIGHT_DECAY)
        for member in members
    ]
    optimizers = [
        SGD(member.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for member in members
    ]
    epoch, number = epoch_of(layer, chosen), 3
    attacked = chosen.method == "dverge+adversarial"
    noises = [
        torch.rand(
            source.shape,
            generator=generator(chosen.seed, "dverge", epoch, number, index),
            dtype=dtype,
        )
        for index in range(chosen.members if attacked else 0)
    ]
    made = watched(monkeypatch)
    losses = stages(chosen, members, optimizers)[1].step(epoch, number, (source, labels, target))
    expected, images = reference.dverge_step(
        descents,
        source,
        labels,
        target,
        layer=layer,
        eps=chosen.dverge.eps,
        step_size=chosen.dverge.step_size,
        steps=chosen.dverge.steps,
        decay=chosen.dverge.decay,
        batchnorm=chosen.dverge.batchnorm,
        weight=chosen.dverge.weight if attacked else 1.0,
        pgd=PGD if attacked else None,
        noises=noises,
    )
    return Compared(
        losses,
        torch.tensor(expected, dtype=dtype),
        [*made.distilled, *made.adversarial],
        [*images.distilled, *images.adversarial],
        members,
        [descent.network for descent in descents],
    )


def watched(monkeypatch: pytest.MonkeyPatch) -> reference.Images:
    """Return what will hold the images that the product makes, members in order."""
    made = reference.Images([], [])
    attacked: dict[int, Tensor] = {}
    distill_all, adversarial_images = dverge.distill_all, adversarial.adversarial_images

    def distilling(*args: Any, **more: Any) -> list[Tensor]:
        found = distill_all(*args, **more)
        made.distilled.extend(found)
        return found

    def attacking(*args: Any) -> Tensor:
        attacked[args[-1]] = adversarial_images(*args)  # threads take turns as they like
        made.adversarial[:] = [attacked[index] for index in sorted(attacked)]
        return attacked[args[-1]]

    monkeypatch.setattr(dverge, "distill_all", distilling)
    monkeypatch.setattr(adversarial, "adversarial_images", attacking)
    return made


def few_images() -> tuple[Tensor, Tensor, Tensor]:
    return tiny_images(4), torch.tensor([0, 3, 1, 2]), tiny_images(4, seed=1)


@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
@pytest.mark.parametrize("batchnorm", ["batch", "running"])
@pytest.mark.parametrize("attacked", [False, True], ids=["dverge", "dverge+adversarial"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_step_in_float64_is_the_literal_procedure(
    count: int, attacked: bool, batchnorm: Norm, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(count, batchnorm, attacked=attacked, steps=3)
    found = compared(chosen, layer, few_images(), torch.float64, monkeypatch)
    assert len(found.images) == count * (1 + attacked)
    for image, expected in zip(found.images, found.expected_images, strict=True):
        torch.testing.assert_close(image, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.losses, found.expected_losses, rtol=0, atol=TOLERANCE)
    for member, network in zip(found.members, found.networks, strict=True):
        state = member.state_dict()
        assert state.keys() == network.tensors.keys()
        for name, tensor in state.items():
            assert float((tensor - network.tensors[name]).abs().max()) <= TOLERANCE, name


@pytest.mark.parametrize("batchnorm", ["batch", "running"])
def test_a_step_in_float32_is_the_literal_procedure_but_for_rounding(
    batchnorm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal pixels are equal bits: where the signs of a gradient agree, both add the same numbers.

    Another sign moves a pixel by twice the step, far past any rounding. More images than one thread
    distils at a time, and the ten steps of the paper.
    """
    chosen = config(3, batchnorm, attacked=False, steps=10)
    count = dverge.PART + 8
    labels = torch.arange(count) % 4
    batch = tiny_images(count), labels, tiny_images(count, seed=1)
    equal = pixels = 0
    for layer in range(1, DEPTH + 1):
        with monkeypatch.context() as patch:
            found = compared(chosen, layer, batch, torch.float32, patch)
        for image, expected in zip(found.images, found.expected_images, strict=True):
            assert not torch.equal(image, batch[0].float())
            equal += int((image == expected).sum())
            pixels += image.numel()
        torch.testing.assert_close(found.losses, found.expected_losses, rtol=2e-4, atol=0)
    assert pixels == DEPTH * 3 * count * 64
    assert equal >= 0.999 * pixels, f"{equal} of {pixels}"
