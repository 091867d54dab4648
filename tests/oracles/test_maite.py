"""MAITE's own `evaluate` takes the engine as it is, and our attacks as augmentations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from maite.protocols import ArrayLike, DatasetMetadata, DatumMetadata, MetricMetadata
from maite.protocols import image_classification as ic
from maite.tasks import evaluate
from torch import Tensor

from dverge_serve import Engine
from training.models.ensemble import Ensemble
from verification.attacks.augmentation import AttackAugmentation
from verification.attacks.gradient_attack import GradientAttack

Array = npt.NDArray[np.float32]


class Digits:
    """Test images `[1, 8, 8]` with one-hot labels, as MAITE wants a data set."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.metadata: DatasetMetadata = {"id": "digits"}
        self.images, self.targets = images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Array, Array, DatumMetadata]:
        return self.images[index], self.targets[index], {"id": index}


class Accuracy:
    """The share of images whose likeliest class is the true one."""

    def __init__(self) -> None:
        self.metadata: MetricMetadata = {"id": "accuracy"}
        self.right: list[bool] = []

    def reset(self) -> None:
        self.right.clear()

    def update(
        self,
        pred_batch: Sequence[ArrayLike],
        target_batch: Sequence[ArrayLike],
        metadata_batch: Sequence[DatumMetadata],
        /,
    ) -> None:
        assert len(pred_batch) == len(target_batch) == len(metadata_batch)
        for scores, target in zip(pred_batch, target_batch, strict=True):
            self.right.append(bool(np.argmax(scores) == np.argmax(target)))

    def compute(self) -> dict[str, Any]:
        return {"accuracy": float(np.mean(self.right)), "images": len(self.right)}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model, device="cpu") as opened:
        yield opened


def accuracy(ensemble: Ensemble, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((ensemble(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("batch_size", [1, 25, 64])
def test_evaluate_takes_the_engine_as_a_model(
    engine: Engine, ensemble: Ensemble, batch: tuple[Tensor, Tensor], batch_size: int
) -> None:
    images, labels = batch
    model: ic.Model = engine  # mypy compares it with the protocol
    dataset: ic.Dataset = Digits(images, labels)
    metric: ic.Metric = Accuracy()
    result, predictions, _ = evaluate(
        model=model, dataset=dataset, metric=metric, batch_size=batch_size, return_preds=True
    )
    assert result == {"accuracy": accuracy(ensemble, images, labels), "images": 64}
    found = np.stack([np.asarray(scores) for each in predictions for scores in each])
    with torch.no_grad():
        expected = ensemble(images).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert model.metadata["index2label"] == {index: str(index) for index in range(10)}


def test_evaluate_takes_an_attack_as_an_augmentation(
    engine: Engine, ensemble: Ensemble, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    attack = GradientAttack(name="pgd", threat="white_box", source="target")
    augmentation: ic.Augmentation = AttackAugmentation(attack, ensemble, 0.3)
    dataset: ic.Dataset = Digits(images, labels)
    result, _, augmented = evaluate(
        model=engine,
        dataset=dataset,
        metric=Accuracy(),
        augmentation=augmentation,
        batch_size=len(images),
        return_augmented_data=True,
    )
    ((found, targets, metadata),) = augmented
    expected = attack(ensemble, images, labels, 0.3)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found]), expected)
    assert [int(np.argmax(target)) for target in targets] == labels.tolist()
    assert [each["id"] for each in metadata] == list(range(64))
    assert result == {"accuracy": accuracy(ensemble, expected, labels), "images": 64}
    assert accuracy(ensemble, images, labels) > 0.8
    assert result["accuracy"] < 0.1
