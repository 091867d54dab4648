"""The record of a cell: one small JSON file, with each image's outcome as a bit."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.cells import Cell
from dverge_serve.files import canonical_json, sha256
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Mask, Outcomes
from verification.metrics.robust_accuracy import THREATS

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parents[1] / "results" / "evidence"

Record = dict[str, Any]


def path_of(cell: Cell, folder: Path = FOLDER) -> Path:
    """Return where a cell's record lies."""
    return folder / f"{cell.slug}.json"


def read(folder: Path = FOLDER) -> list[Record]:
    """Return all records there are, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def fingerprint(definition: Mapping[str, Any]) -> str:
    """Return the hash of what shapes a cell's figures."""
    return sha256(canonical_json(definition))


def current(cell: Cell, folder: Path = FOLDER) -> bool:
    """Return whether the cell's record is there, and is of the cell as it is defined now."""
    path = path_of(cell, folder)
    return path.is_file() and matches(cell, json.loads(path.read_text()))


def matches(cell: Cell, found: Record) -> bool:
    """Return whether a record is of the cell as it is defined now.

    Settings that did not exist when it was run count as they were then: the default.
    """
    now = json.loads(canonical_json(cell.definition()))
    known = fingerprint(_restricted(now, found["definition"]))
    return bool(found["schema_version"] == SCHEMA_VERSION and known == found["definition_sha256"])


def threats(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> Record:
    """Return the bits of one model: clean, and under each threat at each radius."""
    of = {threat: [attack for attack in suite if attack.threat == threat] for threat in THREATS}
    return {
        "clean": packed(outcome.clean & ~outcome.invalid),
        **{
            threat: {f"{each:g}": packed(outcome.robust(attacks, each)) for each in eps}
            for threat, attacks in of.items()
        },
    }


def packed(mask: Mask) -> str:
    """Return a bool `[n]` as base64 of its bits, the first image in the highest bit."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def unpacked(text: str, n: int) -> Mask:
    """Return `packed`'s bool `[n]`."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n)
    return bits.astype(bool)


def _restricted(now: Any, then: Any) -> Any:
    """Return `now` with only the keys that `then` has, at every depth."""
    if not isinstance(now, dict) or not isinstance(then, dict):
        return now
    return {key: _restricted(now.get(key), value) for key, value in then.items()}
