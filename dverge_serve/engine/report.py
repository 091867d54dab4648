"""The robustness report of a model file as typed values; reading one needs no torch."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dverge_serve.errors import UserError
from dverge_serve.files import read_json

SCHEMA_VERSION = 1
# How reports, and AutoAttack, write a norm.
NORMS: dict[Literal["linf", "l2"], str] = {"linf": "Linf", "l2": "L2"}

Verdict = Literal["VALID", "INCONCLUSIVE", "INVALID"]
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
class RobustRate(Rate):
    """The share of images answered rightly untouched and after every attack of one threat.

    An image must survive both as computed (float) and rounded to 8 bits (delivered).
    """

    as_float: float
    delivered: float
    of_clean_correct: float | None  # share of the images that are right untouched
    attacks: Mapping[str, float]  # share that survives each attack alone, by its name
    worst: Mapping[str, Any] | None = (
        None  # `attack`, `value`: the strongest of those on all images
    )


@dataclass(frozen=True, kw_only=True)
class RobustAccuracy:
    """Robust accuracy at one radius, for each threat; None where no such attack was run."""

    transfer: RobustRate | None
    white_box: RobustRate | None
    all: RobustRate | None


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Clean accuracy, and robust accuracy by radius, in rising order."""

    clean_accuracy: Rate
    robust_accuracy: Mapping[float, RobustAccuracy]


@dataclass(frozen=True, kw_only=True)
class Control(Accuracies):
    """An undefended model under the same attacks: `own` standard members, or a surrogate's name."""

    what: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """McNemar's exact test of two models on the same images, clean or under one threat."""

    what: str
    eps: float
    only_this: int  # images that only the verified model answers rightly
    only_other: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Against(Accuracies):
    """Another model file under the same attacks."""

    file: str
    sha256: str
    comparison: tuple[Comparison, ...]


@dataclass(frozen=True)
class Gate:
    """One check's result."""

    name: str
    passed: bool | None  # None where it could not be run
    failure: Verdict  # the evaluation's, if the check fails; INCONCLUSIVE if it cannot be run
    detail: str  # the figures behind it, for people

    def to_json(self) -> dict[str, Any]:
        """Return the form kept in the report."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class VerifiedModel:
    """The model file that was attacked."""

    file: str
    sha256: str
    name: str
    members: int
    precision: str
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images that were attacked."""

    name: str  # of the data set
    part: str
    n: int
    sha256: str


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
    same_model: bool  # whether it serves the verified file
    exposure: str  # `label`, `scores` or `full`
    exposed: tuple[str, ...]
    requests: int
    clean_accuracy: Rate
    transfer: Rate
    square: LiveSquare

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Live:
        """Return it from the report's section `live`."""
        rates = {key: _pick(Rate, table[key]) for key in ("clean_accuracy", "transfer")}
        exposed, square = tuple(table["exposed"]), _pick(LiveSquare, table["square"])
        return _pick(cls, table, exposed=exposed, square=square, **rates)


@dataclass(frozen=True, kw_only=True)
class Report(Accuracies):
    """The robustness report of a model file: its headline figures typed, all of it in `to_json`."""

    verdict: Verdict
    preset: str
    model: VerifiedModel
    data: Images
    norm: Literal["Linf", "L2"]
    seed: int
    control: Control | None
    against: Against | None
    gates: tuple[Gate, ...]
    live: Live | None
    live_error: str | None  # why a live service could not be attacked to the end
    configuration_sha256: str  # of attacks, radii, seed and surrogates
    finished: str  # UTC, ISO 8601
    seconds: float
    _table: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report from its JSON file.

        Raises:
            UserError: no such file, or not a report of a schema this version reads.
        """
        table = read_json(Path(path), "a report of `dverge verify-robustness`")
        return cls.from_json(table, str(path))

    @classmethod
    def from_json(cls, table: Any, name: str = "this") -> Report:
        """Return a report from the parsed content of its JSON file.

        Args:
            table: the content.
            name: of the file, for the error.

        Raises:
            UserError: not a report of a schema this version reads.
        """
        if not _readable(table):
            expected = f"schema {SCHEMA_VERSION} or older"
            raise UserError(f"{name} is not a report this version reads", expected)
        try:
            return cls._from_table(table)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is a damaged report ({error!r})", "one as written") from error

    @classmethod
    def _from_table(cls, table: dict[str, Any]) -> Report:
        control, against, live = table["control"], table["against"], table.get("live", {})
        rows = tuple(_pick(Comparison, row) for row in against["comparison"]) if against else ()
        return _pick(
            cls,
            table,
            **_accuracies(table),
            model=_pick(VerifiedModel, table["model"]),
            data=_pick(Images, table["data"]),
            norm=table["threat_model"]["norm"],
            control=control and _pick(Control, control, **_accuracies(control)),
            against=against and _pick(Against, against, comparison=rows, **_accuracies(against)),
            gates=tuple(_pick(Gate, gate) for gate in table["gates"]),
            live=Live.from_json(live) if "eps" in live else None,
            live_error=live.get("error"),
            finished=table["run"]["finished"],
            seconds=table["run"]["seconds"],
            _table=table,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the whole report, as in its JSON file and by its schema."""
        return copy.deepcopy(self._table)


def report_path(model: Path) -> Path:
    """Return the path of the report of `model`: `model.report.json` for `model.onnx`."""
    return model.with_name(f"{model.stem}.report.json")


def page_path(model: Path) -> Path:
    """Return the path of the report of `model` as a page: `model.report.html`."""
    return model.with_name(f"{model.stem}.report.html")


def read_report(model: Path, model_sha256: str) -> dict[str, Any] | None:
    """Return the report of `model` as parsed JSON, or None if none is about exactly these bytes.

    A report counts only if it names `model_sha256` and has a schema this version reads.
    """
    try:
        report: dict[str, Any] = json.loads(report_path(model).read_bytes())
        matches = _readable(report) and report["model"]["sha256"] == model_sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if matches else None


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a report's figures that are for anybody: they do not help an attacker."""
    keys = ("verdict", "clean_accuracy", "robust_accuracy")
    return {key: report[key] for key in keys if key in report}


def _readable(table: Any) -> bool:
    """Tell whether this is a report of this version's schema or an older one."""
    version = table.get("schema_version") if isinstance(table, dict) else None
    return isinstance(version, int) and 1 <= version <= SCHEMA_VERSION


def _pick(kind: Callable[..., T], table: Mapping[str, Any], **given: Any) -> T:
    """Build a dataclass from those keys of `table` that it has; `given` values win."""
    known = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in table.items() if key in known} | given)


def _accuracies(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "clean_accuracy": _pick(Rate, table["clean_accuracy"]),
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
    return _pick(RobustRate, rate, as_float=rate["float"])
