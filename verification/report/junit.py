"""The report for CI: JUnit."""

from __future__ import annotations

from xml.etree import ElementTree as ET

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
