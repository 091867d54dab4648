"""Predictions: labels, probabilities and votes for each image of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dverge_serve.engine.outputs import Scores

TOP = 5


@dataclass(frozen=True, slots=True)
class ClassProbability:
    """A class, its index among the model's labels, and its probability, 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The ensemble's prediction for one image.

    Args:
        label: the likeliest class.
        index: its index among the model's labels.
        probability: of it, from the softmax of the members' mean logits, 0 to 1.
        top: the likeliest classes, at most five, best first.
        agreement: share of members whose own prediction is the ensemble's, 0 to 1.
        disagreement: Jensen-Shannon divergence of the members' probabilities, nats.
        votes: each member's own prediction with its own probability, in the members' order.
    """

    label: str
    index: int
    probability: float
    top: tuple[ClassProbability, ...]
    agreement: float
    disagreement: float
    votes: tuple[ClassProbability, ...]


class Predictions:
    """The predictions of a batch, each made when it is asked for, without numpy.

    Args:
        scores: of the batch.
        labels: of the model.
    """

    def __init__(self, scores: Scores, labels: Sequence[str]) -> None:
        self.scores, self._labels = scores, labels
        self._top = np.argsort(-scores.logits, axis=1, kind="stable")[:, :TOP].tolist()
        self._votes = scores.votes.tolist()
        self.agreement: list[float] = scores.agreement.tolist()
        self.disagreement: list[float] = scores.disagreement.tolist()

    def __len__(self) -> int:
        return len(self._top)

    def __getitem__(self, row: int) -> Prediction:
        share = self.scores.probabilities[row].item
        top = tuple(self._class(index, share(index)) for index in self._top[row])
        share = self.scores.member_probabilities[row].item
        votes = enumerate(self._votes[row])
        return Prediction(
            label=top[0].label,
            index=top[0].index,
            probability=top[0].probability,
            top=top,
            agreement=self.agreement[row],
            disagreement=self.disagreement[row],
            votes=tuple(self._class(index, share(member, index)) for member, index in votes),
        )

    def __iter__(self) -> Iterator[Prediction]:
        return map(self.__getitem__, range(len(self)))

    def labels(self) -> list[str]:
        """Return each image's label."""
        return [self._labels[top[0]] for top in self._top]

    def _class(self, index: int, probability: float) -> ClassProbability:
        return ClassProbability(self._labels[index], index, probability)
