"""An attack as a MAITE augmentation, so that JATIC tools can evaluate any model under it.

MAITE's protocols are structural: nothing is imported from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from verification.attacks.attack import Attack, Model

if TYPE_CHECKING:
    from typing_extensions import ReadOnly

Batch = tuple[Sequence[Any], Sequence[Any], Sequence[Mapping[str, Any]]]
# Any metadata has an `id` at least; the other keys are the data set's own.
Attacked = tuple[list[npt.NDArray[np.float32]], list[Any], list[Any]]


class AugmentationMetadata(TypedDict):
    """Metadata of an augmentation, as MAITE's protocols define it."""

    id: ReadOnly[str]


class AttackAugmentation:
    """A MAITE augmentation for image classification: images in, adversarial images out.

    Args:
        attack: one of ours or your own.
        model: to attack: images `[N, C, H, W]` in `[0,1]` to logits, in evaluation mode.
        eps: radius of the ball, pixels in `[0,1]`.
        seed: of the random draws; a batch gives the same images each time.
        device: where the model is.
    """

    def __init__(
        self,
        attack: Attack,
        model: Model,
        eps: float,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.metadata: AugmentationMetadata = {
            "id": f"{attack.name}, {attack.norm} eps {eps:g}, seed {seed}"
        }
        self._attack, self._model, self._eps = attack, model, eps
        self._seed, self._device = seed, device

    def __call__(self, batch: Batch, /) -> Attacked:
        """Return the batch with adversarial images.

        Args:
            batch: images `[C, H, W]` in `[0,1]` of one shape, targets one-hot or as probabilities
                `[K]`, and each image's metadata.

        Returns:
            float32 images `[C, H, W]`, the same targets, and the metadata with the key `attack`.
        """
        inputs, targets, metadata = batch
        images = torch.from_numpy(np.stack([np.asarray(each, np.float32) for each in inputs]))
        labels = torch.tensor([int(np.argmax(np.asarray(each))) for each in targets])
        images, labels = images.to(self._device), labels.to(self._device)
        made = self._attack(self._model, images, labels, self._eps, seed=self._seed)
        marked = [{**each, "attack": self.metadata["id"]} for each in metadata]
        return list(made.cpu().numpy()), list(targets), marked
