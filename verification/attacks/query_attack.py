"""Attacks of callers: they know a model's answers and nothing else, and their queries count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from verification.attacks.attack import Attack, Model, ReportedAttack, Threat

Answers = Literal["scores", "labels"]


@dataclass(frozen=True, kw_only=True)
class QueryAttack(Attack):
    """An attack on the target's answers; its `run` returns `Crafted.queries`.

    Args:
        queries: most queries an image.
        answers: what the model that `run` is given returns: `scores`, the logits `[N, classes]`,
            or `labels`, int64 `[N]`, the most likely class alone.
    """

    threat: Threat = "queries"
    source: str = "target"
    queries: int
    answers: Answers = "scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("answers", get_args(Answers))

    def seen(self, model: Model) -> Model:
        """Return what the attack sees of a model: its scores, or its labels alone."""
        return model if self.answers == "scores" else lambda images: model(images).argmax(1)

    @property
    def work(self) -> int:
        """Queries an image, for progress."""
        return max(self.queries, 1)


@dataclass(frozen=True, kw_only=True)
class ReportedQueryAttack(QueryAttack, ReportedAttack):
    """An attack by queries of its user's own, as far as a report knows it: it cannot be run."""
