"""What other people's tools see: an ensemble goes into attack libraries without an adapter.

Each library attacks the module itself with its own PGD, without a random start, so that the images
it finds can be compared with ours, pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from foolbox.attacks import LinfPGD
from foolbox.models.pytorch import PyTorchModel
from pyautoattack import AutoAttack
from torch import Tensor, nn

from training.models.ensemble import Ensemble
from training.pgd import cross_entropy, pgd_loop

EPS, STEP_SIZE, STEPS = 0.3, 0.06, 10

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(model: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
    loss = cross_entropy(model, labels)
    return pgd_loop(loss, x0, eps=EPS, step_size=STEP_SIZE, steps=STEPS)


def by_foolbox(model: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
    attack = LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=False)
    seen = PyTorchModel(model, bounds=(0, 1), device="cpu")
    found, _, _ = attack(seen, x0, labels, epsilons=EPS)
    assert isinstance(found, Tensor)
    return found


def by_torchattacks(model: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
    attack = torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=False)
    found: Tensor = attack(x0, labels)
    return found


def by_art(model: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
    seen = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x0.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescent(
        seen, eps=EPS, eps_step=STEP_SIZE, max_iter=STEPS, batch_size=len(x0), verbose=False
    )
    return torch.from_numpy(attack.generate(x0.numpy(), labels.numpy()))


def robustbench_accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 25) -> float:
    """The loop of RobustBench's `clean_accuracy`: the module is called on `[0,1]` images."""
    right = 0.0
    with torch.no_grad():
        for at in range(0, len(x), batch_size):
            output = model(x[at : at + batch_size])
            right += (output.max(1)[1] == y[at : at + batch_size]).float().sum().item()
    return right / len(x)


@pytest.mark.parametrize("attack", [by_foolbox, by_torchattacks, by_art])
def test_its_pgd_finds_the_images_that_ours_finds(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], attack: Attack
) -> None:
    x0, labels = batch
    before = x0.clone()
    found = attack(ensemble, x0, labels)
    torch.testing.assert_close(found, ours(ensemble, x0, labels), rtol=0, atol=1e-6)
    assert torch.equal(x0, before)
    assert not any(module.training for module in ensemble.modules())
    assert all(parameter.grad is None for parameter in ensemble.parameters())


@pytest.mark.parametrize("attack", [by_foolbox, by_torchattacks, by_art])
def test_white_box_images_lie_in_the_ball_and_fool_the_ensemble(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], attack: Attack
) -> None:
    x0, labels = batch
    found = attack(ensemble, x0, labels)
    assert found.dtype == torch.float32
    assert float((found - x0).abs().max()) == pytest.approx(EPS, abs=1e-6)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    assert robustbench_accuracy(ensemble, x0, labels) > 0.8
    assert robustbench_accuracy(ensemble, found, labels) < 0.1


def test_autoattack_takes_it_as_robustbench_does(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor]
) -> None:
    x0, labels = (part[:16] for part in batch)
    suite = AutoAttack(
        ensemble, norm="Linf", eps=EPS, version="custom", attacks=["apgd-ce"], seed=0
    )
    with torch.random.fork_rng():
        found, _ = suite.run_standard_evaluation(x0, labels)
    assert float((found - x0).abs().max()) <= EPS + 1e-6
    assert robustbench_accuracy(ensemble, found, labels) < 0.1
