"""The accuracies of a report as typed values: shares of images with intervals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of `n` images, in `[0,1]`, with its Wilson 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def percent(self) -> str:
        """The share for people: "95.3%"."""
        return f"{self.value:.1%}"

    @property
    def interval(self) -> str:
        """The share and its interval for people: "95.3% (92.6-97.1)"."""
        return f"{self.percent} ({100 * self.low:.1f}-{100 * self.high:.1f})"


@dataclass(frozen=True, kw_only=True)
class WorstAttack:
    """The attack that breaks most by itself, of those that were run on all images."""

    attack: str
    value: float  # the share that survives it


@dataclass(frozen=True, kw_only=True)
class RobustRate(Rate):
    """The share of images answered rightly untouched and after every attack of one threat.

    An image must survive both as computed (float) and rounded to 8 bits (delivered).
    """

    as_float: float
    delivered: float
    of_clean_correct: float | None  # share of the images that are right untouched
    attacks: Mapping[str, float]  # share that survives each attack alone, by its name
    worst: WorstAttack | None = None  # None in reports of earlier versions


@dataclass(frozen=True, kw_only=True)
class RobustAccuracy:
    """Robust accuracy at one radius, for each threat; None where no such attack was run."""

    transfer: RobustRate | None
    white_box: RobustRate | None
    all: RobustRate | None


@dataclass(frozen=True, kw_only=True)
class RateByQueries(Rate):
    """The share of a sample that is answered rightly after so many queries an image."""

    queries: int
    attack: str  # that leaves the fewest


@dataclass(frozen=True, kw_only=True)
class ByQueries:
    """Robust accuracy at one radius against callers who see `scores`, or `labels` alone."""

    eps: float
    answers: str
    median: float | None  # queries for half of the images that were broken
    points: tuple[RateByQueries, ...]  # in rising order of queries

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> ByQueries:
        """Return it from an entry of the report's section `by_queries`."""
        points = tuple(pick(RateByQueries, point) for point in table["points"])
        return pick(cls, table, points=points)

    def at(self, queries: int) -> RateByQueries:
        """Return the rate at the most of the listed queries that are no more than these."""
        return [point for point in self.points if point.queries <= queries][-1]


@dataclass(frozen=True, kw_only=True)
class Substitute:
    """Networks trained on the model's own answers, and the attacks transferred from them."""

    answers: str
    queries: int
    agreement: float  # share of the test images that it answers as the model does
    robust_accuracy: Mapping[float, Rate]

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Substitute:
        """Return it from the report's section `substitute`."""
        rows = {row["eps"]: pick(Rate, row) for row in table["robust_accuracy"]}
        return pick(cls, table, robust_accuracy=rows)


@dataclass(frozen=True, kw_only=True)
class CleanAccuracies:
    """Clean accuracy of the model and its control on more images than were attacked."""

    model: Rate
    control: Rate | None

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> CleanAccuracies:
        """Return it from the report's section `more_clean_images`."""
        control = table["control"]
        return cls(model=pick(Rate, table["model"]), control=control and pick(Rate, control))


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Clean accuracy, and robust accuracy by radius, in rising order."""

    clean_accuracy: Rate
    robust_accuracy: Mapping[float, RobustAccuracy]


def pick(kind: Callable[..., T], table: Mapping[str, Any], **given: Any) -> T:
    """Build a dataclass from those keys of `table` that it has; `given` values win."""
    known = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in table.items() if key in known} | given)


def accuracies(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Accuracies` from a report's keys of the same names."""
    return {
        "clean_accuracy": pick(Rate, table["clean_accuracy"]),
        "robust_accuracy": {
            row["eps"]: RobustAccuracy(
                **{threat: _robust(row[threat]) for threat in ("transfer", "white_box", "all")}
            )
            for row in table["robust_accuracy"]
        },
    }


def _robust(rate: Mapping[str, Any] | None) -> RobustRate | None:
    if rate is None:
        return None
    return pick(RobustRate, rate, as_float=rate["float"])
