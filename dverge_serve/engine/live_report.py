"""A report's section about a live service, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dverge_serve.engine.rates import Rate, pick


@dataclass(frozen=True, kw_only=True)
class LiveQueries:
    """The attack on one image after another, by the service's scores or by labels alone."""

    attack: str
    answers: str  # `scores` or `labels`
    images: int  # random ones that the service answers rightly untouched
    broken: int
    queries: int
    queries_each_at_most: int
    flagged_images: int = 0  # whose queries the service's own watch marked or refused
    flagged_after: int | None = None  # the fewest queries of an image before that
    refused: int = 0  # images whose attack ended there


@dataclass(frozen=True, kw_only=True)
class LiveSubstitute:
    """The attack from a network trained on the service's answers."""

    answers: str  # `scores` or `labels`
    queries: int
    robust: Rate


@dataclass(frozen=True, kw_only=True)
class Live:
    """The attack on a live service."""

    eps: float
    same_model: bool | None  # whether it serves the verified file; None: it does not say
    exposure: str  # `label`, `scores` or `full`
    exposed: tuple[str, ...]
    requests: int
    clean_accuracy: Rate
    transfer: Rate
    substitute: LiveSubstitute
    by_queries: LiveQueries

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Live:
        """Return it from the report's section `live`."""
        rates = {key: pick(Rate, table[key]) for key in ("clean_accuracy", "transfer")}
        stolen = table["substitute"]
        return pick(
            cls,
            table,
            exposed=tuple(table["exposed"]),
            substitute=pick(LiveSubstitute, stolen, robust=pick(Rate, stolen["robust"])),
            by_queries=pick(LiveQueries, table["by_queries"]),
            **rates,
        )
