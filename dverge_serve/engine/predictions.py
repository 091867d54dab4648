"""Predictions: labels, probabilities and votes for each image of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
        order = np.argsort(-scores.logits, axis=1, kind="stable")[:, :TOP]
        self._top = order.tolist()
        rows = np.arange(len(order))[:, None]
        self._top_shares = scores.probabilities[rows, order].tolist()
        self._votes = scores.votes.tolist()
        self._vote_shares = scores.member_probabilities.max(axis=-1).tolist()
        self.agreement: list[float] = scores.agreement.tolist()
        self.disagreement: list[float] = scores.disagreement.tolist()

    def __len__(self) -> int:
        return len(self._top)

    def __getitem__(self, row: int) -> Prediction:
        top = self._named(self._top[row], self._top_shares[row])
        votes = self._named(self._votes[row], self._vote_shares[row])
        return Prediction(
            label=top[0].label,
            index=top[0].index,
            probability=top[0].probability,
            top=top,
            agreement=self.agreement[row],
            disagreement=self.disagreement[row],
            votes=votes,
        )

    def __iter__(self) -> Iterator[Prediction]:
        return map(self.__getitem__, range(len(self)))

    def labels(self) -> list[str]:
        """Return each image's label."""
        return [self._labels[top[0]] for top in self._top]

    def _named(
        self, indices: Iterable[int], probabilities: Iterable[float]
    ) -> tuple[ClassProbability, ...]:
        pairs = zip(indices, probabilities, strict=True)
        return tuple(ClassProbability(self._labels[index], index, share) for index, share in pairs)
