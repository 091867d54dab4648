"""The report as one self-contained page: the verdict first."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from verification.report import sections
from verification.report.markup import bullets, percent, plot

CSS = resources.files("verification.report").joinpath("page.css").read_text(encoding="utf-8")
MEANS = {
    "VALID": "The evaluation passed its own checks; the figures below mean what they say.",
    "INCONCLUSIVE": "At least one check failed or could not be run: the figures may flatter the "
    "model and must not be relied on.",
    "INVALID": "A check shows that evaluation or model is broken: the figures mean nothing.",
}


def page(report: dict[str, Any], plots: Mapping[str, bytes]) -> bytes:
    """Return the report as UTF-8 HTML that fetches nothing and runs nothing.

    Args:
        report: as written to `model.report.json`.
        plots: PNG bytes by name (`curves`, `matrices`, `regions`, `pictures`).
    """
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    model = report["model"]
    title = f"Robustness of {model['file']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">model {escape(model["name"])}, {model["members"]} members, '
        f"{escape(model['precision'])}; sha256 <code>{model['sha256']}</code></p>",
        f'<div class="verdict {report["verdict"]}"><strong>{report["verdict"]}</strong>'
        f"<p>{MEANS[report['verdict']]}</p>{_failed(report)}</div>",
        "<h2>In plain words</h2>",
        *(f"<p>{sentence}</p>" for sentence in summary(report)),
        plot("curves", plots),
        "<h2>Accuracy under attack</h2>",
        sections.accuracy(report),
        sections.against(report),
        "<h2>Each attack alone</h2>",
        sections.each_attack(report),
        "<h2>Disagreement as an alarm</h2>",
        sections.alarm(report),
        sections.members(report, plots),
        plot("pictures", plots, heading="What an attack looks like"),
        "<h2>Checks of this evaluation</h2>",
        sections.gates(report),
        sections.live(report),
        "<h2>What was done</h2>",
        sections.threat(report),
        sections.parameters(report),
        "<h2>Out of scope</h2>",
        bullets(report["out_of_scope"]),
        "<h2>Check it yourself</h2>",
        sections.replay(report),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
    )
    return (head + "\n".join(part for part in body if part) + "</main></body></html>\n").encode()


def summary(report: dict[str, Any]) -> list[str]:
    """Return the report in sentences for people who sign, as HTML."""
    row, n = report["robust_accuracy"][-1], report["data"]["n"]
    clean = report["clean_accuracy"]
    unseen = " that no training saw" if report["data"]["training_known"] else ""
    said = [
        f"On {n} test images{unseen}, the model answers {percent(clean)} rightly "
        f"when nobody interferes."
    ]
    change = (
        f"every pixel by up to {100 * row['eps']:.3g}% of the pixel range"
        if _linf(report)
        else f"the image by up to {row['eps']:g} in L2 length, pixels running from 0 to 1"
    )
    if row["transfer"]:
        said.append(
            f"Where an attacker who has models of their own, but not this one, may change "
            f"{change}, it still answers {percent(row['transfer'])} rightly."
        )
    if row["white_box"]:
        said.append(
            f"An attacker who holds the model's weights leaves {percent(row['white_box'])}. "
            "Diversity defends against transferred attacks; keep the weights secret."
        )
    else:
        said.append("What an attacker with the weights could do was not measured.")
    if report["control"] and report["control"]["what"] == "own":
        other = report["control"]["robust_accuracy"][-1]["transfer"]
        said.append(
            f"The same ensemble without the defence keeps {percent(other)} under the same "
            "transferred attacks."
        )
    return said


def _failed(report: dict[str, Any]) -> str:
    names = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    return f"<p>Not passed: {escape(', '.join(names))}.</p>" if names else ""


def _linf(report: dict[str, Any]) -> bool:
    return bool(report["threat_model"]["norm"] == "Linf")
