"""The robustness report beside a model file, as the service takes it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dverge_serve.engine.report import headline, read_report, report_path
from dverge_serve.errors import UserError

# Whether there is a report about this very file, none at all, or one about another file.
ReportState = Literal["present", "missing", "foreign"]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What lies beside a model file.

    Args:
        state: whether it is a report about this file.
        value: the report as parsed JSON; None unless it is present.
        threshold: the disagreement above which an image is suspicious; None where no report says.
    """

    state: ReportState
    value: dict[str, Any] | None = None
    threshold: float | None = None

    @property
    def headline(self) -> dict[str, Any] | None:
        """The verdict and accuracies; None without a report."""
        return None if self.value is None else headline(self.value)

    @property
    def told(self) -> str:
        """What there is, in words, for the log."""
        if self.state == "present":
            return "its report" if self.threshold is not None else "its report, which has no alarm"
        none = "no report" if self.state == "missing" else "the report of another file"
        return f"{none}, and so no alarm"


def read_model_report(model: Path, sha256: str) -> ModelReport:
    """Read the report beside `model`.

    Args:
        model: the model file.
        sha256: its hash, 64 hex digits.

    Raises:
        UserError: it is damaged: no JSON, no report of a known version, or no finite threshold.
    """
    path = report_path(model)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return ModelReport("missing")
    except OSError as error:
        raise _damaged(path, error.strerror or "unreadable") from error
    try:
        table = json.loads(text, parse_constant=_refuse)
        named = table["model"]["sha256"]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "not valid JSON") from error
    except (KeyError, TypeError) as error:
        raise _damaged(path, "it names no model") from error
    if named != sha256:
        return ModelReport("foreign")
    value = read_report(model, sha256)
    if value is None:
        raise _damaged(path, f"schema version {str(table.get('schema_version'))[:20]}")
    disagreement = value.get("disagreement")
    if disagreement is None:
        return ModelReport("present", value)
    threshold = disagreement.get("threshold") if isinstance(disagreement, dict) else None
    if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise _damaged(path, "its threshold of disagreement is not a number")
    return ModelReport("present", value, float(threshold))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"cannot use the report {path} ({why})",
        "the report of this model file",
        "verify the model again, or remove the report",
    )
