"""An ensemble's outputs: logits, probabilities, votes and disagreement of the members."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
TINY = np.finfo(np.float64).tiny


def softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the softmax over the last axis, in float64, stable for large logits."""
    wide = np.asarray(logits, dtype=np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@dataclass(eq=False)  # not frozen: that would make it twice as slow to make, at every call
class Scores:
    """The outputs of one model call; not to be changed.

    Args:
        logits: float32 `[batch, classes]`, the mean of the members' logits.
        member_logits: float32 `[batch, members, classes]`.
    """

    logits: Floats
    member_logits: Floats

    def __len__(self) -> int:
        return len(self.logits)

    @cached_property
    def _softmax(self) -> npt.NDArray[np.float64]:
        """Softmax of the mean logits, then of each member's, `[batch, 1 + members, classes]`."""
        return softmax(np.concatenate([self.logits[:, None], self.member_logits], axis=1))

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Softmax of the mean logits, `[batch, classes]`."""
        return self._softmax[:, 0]

    @cached_property
    def predictions(self) -> npt.NDArray[np.int64]:
        """The ensemble's predictions, class indices `[batch]`."""
        return np.asarray(self.logits.argmax(axis=-1))

    @cached_property
    def agreement(self) -> npt.NDArray[np.float64]:
        """Share of members whose own prediction is the ensemble's, `[batch]` in 0..1."""
        same = self.votes == self.predictions[:, None]
        return np.asarray(same.sum(axis=1) / same.shape[1])

    @cached_property
    def votes(self) -> npt.NDArray[np.int64]:
        """Each member's own predictions, class indices `[batch, members]`."""
        return np.asarray(self.member_logits.argmax(axis=-1))

    @property
    def member_probabilities(self) -> npt.NDArray[np.float64]:
        """Softmax of each member's logits, `[batch, members, classes]`."""
        return self._softmax[:, 1:]

    @cached_property
    def disagreement(self) -> npt.NDArray[np.float64]:
        """Jensen-Shannon divergence of the members' softmax outputs, `[batch]`, nats.

        0 where all members give the same probabilities, log(members) at most.
        """
        members = self.member_probabilities
        count = members.shape[1]
        mean = members.sum(axis=1, keepdims=True) / count
        entropies = _entropy(np.concatenate([mean, members], axis=1))
        return np.asarray(np.maximum(entropies[:, 0] - entropies[:, 1:].sum(axis=1) / count, 0.0))

    @classmethod
    def concatenate(cls, parts: list[Scores]) -> Scores:
        """Join the outputs of several calls in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.member_logits for part in parts]),
        )


def _entropy(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    logarithms = np.log(np.maximum(probabilities, TINY))
    return np.asarray(-(probabilities * logarithms).sum(axis=-1))
