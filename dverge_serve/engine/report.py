"""The robustness report of a model file as typed values; reading one needs no torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dverge_serve.engine.live_report import Live
from dverge_serve.engine.radius import written
from dverge_serve.engine.rates import (
    Accuracies,
    ByQueries,
    CleanAccuracies,
    Substitute,
    accuracies,
    pick,
)
from dverge_serve.errors import UserError
from dverge_serve.files import read_json

SCHEMA_VERSION = 1
# How reports, and AutoAttack, write a norm.
NORMS: dict[Literal["linf", "l2"], str] = {"linf": "Linf", "l2": "L2"}

Verdict = Literal["VALID", "INCONCLUSIVE", "INVALID"]


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
    next_step: str = ""  # what to do about it, where it did not pass; parameters in backticks

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
class Report(Accuracies):
    """The robustness report of a model file: its headline figures typed, all of it in `to_json`."""

    verdict: Verdict
    preset: str
    model: VerifiedModel
    data: Images
    norm: Literal["Linf", "L2"]
    seed: int
    more_clean_images: CleanAccuracies | None  # None where all test images were attacked
    by_queries: tuple[ByQueries, ...]
    substitute: Substitute | None  # None in reports of older versions
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
        stolen, more = table.get("substitute"), table.get("more_clean_images")
        rows = tuple(pick(Comparison, row) for row in against["comparison"]) if against else ()
        return pick(
            cls,
            table,
            **accuracies(table),
            model=pick(VerifiedModel, table["model"]),
            data=pick(Images, table["data"]),
            norm=table["threat_model"]["norm"],
            more_clean_images=CleanAccuracies.from_json(more) if more else None,
            by_queries=tuple(map(ByQueries.from_json, table.get("by_queries", ()))),
            substitute=Substitute.from_json(stolen) if stolen else None,
            control=control and pick(Control, control, **accuracies(control)),
            against=against and pick(Against, against, comparison=rows, **accuracies(against)),
            gates=tuple(pick(Gate, gate) for gate in table["gates"]),
            live=Live.from_json(live) if "eps" in live else None,
            live_error=live.get("error"),
            finished=table["run"]["finished"],
            seconds=table["run"]["seconds"],
            _table=table,
        )

    def radius(self, eps: float) -> str:
        """Return a radius for people, as it was given: "0.1", "8/255 = 0.0314"."""
        threat = self._table["threat_model"]
        given = dict(zip(threat["eps"], threat.get("eps_given", ()), strict=False))
        return written(eps, given.get(eps, ""))

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


def no_report(model: Path) -> str:
    """Say why `read_report` found no report of `model`, in words."""
    path = report_path(model)
    if not path.exists():
        return "no report for this file"
    try:
        Report.load(path)
    except UserError as error:
        return error.found
    return f"{path.name} is about another file"


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a report's figures that are for anybody: they do not help an attacker."""
    keys = ("verdict", "clean_accuracy", "robust_accuracy")
    return {key: report[key] for key in keys if key in report}


def _readable(table: Any) -> bool:
    """Tell whether this is a report of this version's schema or an older one."""
    version = table.get("schema_version") if isinstance(table, dict) else None
    return isinstance(version, int) and 1 <= version <= SCHEMA_VERSION
