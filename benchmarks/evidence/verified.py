"""Verification reports, kept small: the figures, and each image's outcome as a bit.

python -m benchmarks.evidence.verified REPORT.json NAME
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.bench import say
from benchmarks.evidence.record import Record, threats
from dverge_serve.files import pretty_json, read_json, write_atomic
from verification.attacks import presets
from verification.attacks.outcomes import Outcomes

FOLDER = Path(__file__).parents[1] / "results" / "verified"
KEPT = (
    *("verdict", "preset", "seed", "model", "data", "threat_model", "surrogates"),
    *("clean_accuracy", "more_clean_images", "configuration_sha256", "tool_version", "run"),
)


def of_report(report: dict[str, Any]) -> Record:
    """Return what tables take from a verification report, and what tells where it is from."""
    eps = [at["eps"] for at in report["robust_accuracy"]]
    outcome = Outcomes.from_json(report["outcomes"]["model"])
    return {
        **{name: report[name] for name in KEPT},
        "n": report["data"]["n"],
        "eps": eps,
        "control": {
            "what": report["control"]["what"],
            "transfer": [at["transfer"]["value"] for at in report["control"]["robust_accuracy"]],
        },
        "outcomes": threats(outcome, presets.from_json(report["attacks"]), eps),
    }


def read(name: str, folder: Path = FOLDER) -> Record:
    """Return the record of this name."""
    found: Record = json.loads((folder / f"{name}.json").read_bytes())
    return found


def describe(told: str, found: Record) -> str:
    """Return what else a verification says, as an item of a list."""
    more, control = (found["more_clean_images"][of] for of in ("model", "control"))
    left = ", ".join(f"{100 * value:.1f}" for value in found["control"]["transfer"])
    return (
        f"{told}: {found['verdict']}; clean {100 * more['value']:.1f} of {more['n']:,} images. "
        f"Its control keeps {left} and has {100 * control['value']:.1f} clean."
    )


def main() -> None:
    """Write the record of a report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("name", metavar="NAME")
    options = parser.parse_args()
    report = read_json(options.report, "a report of `dverge verify-robustness`")
    path = FOLDER / f"{options.name}.json"
    write_atomic(path, pretty_json(of_report(report)))
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
