"""A report's section about a live service, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dverge_serve.engine.rates import Rate, pick


@dataclass(frozen=True, kw_only=True)
class LiveSquare:
    """The Square attack on a live service."""

    images: int
    broken: int
    queries: int
    queries_each_at_most: int


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
    square: LiveSquare

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Live:
        """Return it from the report's section `live`."""
        rates = {key: pick(Rate, table[key]) for key in ("clean_accuracy", "transfer")}
        exposed, square = tuple(table["exposed"]), pick(LiveSquare, table["square"])
        return pick(cls, table, exposed=exposed, square=square, **rates)
