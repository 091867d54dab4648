"""The report for other tools: JUnit for CI, CycloneDX for a bill of materials."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

from dverge_serve import __version__
from dverge_serve.engine.rates import Rate
from dverge_serve.engine.report import Report


def junit(report: Report, wanted: list[tuple[str, bool, str]] | None = None) -> bytes:
    """Return the gates, the verdict, and what was asked of the accuracy, as JUnit XML.

    A gate that was not run is skipped; one that failed is a failure, as is a missed demand, and any
    verdict but VALID: a reader of this file alone must not take it for a pass.

    Args:
        report: the report.
        wanted: further cases: name, met or not, the figures.
    """
    cases = [
        (gate.name, gate.passed, "; ".join(filter(None, (gate.detail, gate.next_step))))
        for gate in report.gates
    ]
    cases += [("verdict", report.verdict == "VALID", report.verdict), *(wanted or [])]
    suite = ET.Element(
        "testsuite",
        name=f"dverge verify-robustness {report.model.file}",
        tests=str(len(cases)),
        failures=str(sum(passed is False for _, passed, _ in cases)),
        skipped=str(sum(passed is None for _, passed, _ in cases)),
        errors="0",
        time=str(report.seconds),
        timestamp=report.finished.rstrip("Z"),
    )
    properties = ET.SubElement(suite, "properties")
    told = {"verdict": report.verdict, "preset": report.preset, "sha256": report.model.sha256}
    for name, value in told.items():
        ET.SubElement(properties, "property", name=name, value=value)
    for name, passed, detail in cases:
        case = ET.SubElement(suite, "testcase", classname="dverge.verification", name=name)
        if passed is None:
            ET.SubElement(case, "skipped", message=detail)
        elif not passed:
            ET.SubElement(case, "failure", message=detail)
        else:
            ET.SubElement(case, "system-out").text = detail
    ET.indent(suite)
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True)) + b"\n"


def bill_of_materials(report: Report) -> dict[str, Any]:
    """Return a CycloneDX 1.6 ML-BOM of the model with its figures as performance metrics."""
    model, slice_ = report.model, f"{report.data.name}, {report.data.part}, {report.data.n} images"
    metrics = [_metric("clean accuracy", report.clean_accuracy, slice_)]
    for eps, row in report.robust_accuracy.items():
        rates = {"transfer": row.transfer, "white-box": row.white_box, "all": row.all}
        where = f"{slice_}, {report.norm} eps {eps:g}"
        metrics += [
            _metric(f"robust accuracy, {threat}", rate, where)
            for threat, rate in rates.items()
            if rate is not None
        ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": report.finished,
            "tools": {
                "components": [
                    {"type": "application", "name": "dverge-serve", "version": __version__}
                ]
            },
        },
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": f"model-{model.sha256[:16]}",
                "name": model.name,
                "version": model.weights_sha256[:16],
                "hashes": [{"alg": "SHA-256", "content": model.sha256}],
                "modelCard": {
                    "modelParameters": {"task": "image classification"},
                    "quantitativeAnalysis": {"performanceMetrics": metrics},
                },
                "properties": [
                    {"name": "dverge:verdict", "value": report.verdict},
                    {"name": "dverge:preset", "value": report.preset},
                    {
                        "name": "dverge:configuration_sha256",
                        "value": report.configuration_sha256,
                    },
                ],
            }
        ],
    }


def _metric(name: str, rate: Rate, where: str) -> dict[str, Any]:
    return {
        "type": name,
        "value": f"{rate.value:.4f}",
        "slice": where,
        "confidenceInterval": {
            "lowerBound": f"{rate.low:.4f}",
            "upperBound": f"{rate.high:.4f}",
        },
    }
