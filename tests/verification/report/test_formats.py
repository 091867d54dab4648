"""JUnit and CycloneDX: what other tools read out of a report."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

from dverge_serve.engine.report import Report
from tests.engine.test_provenance import made
from tests.verification.report.test_page import table
from verification.report.bill_of_materials import bill_of_materials
from verification.report.junit import junit


def told(verdict: str = "VALID") -> Report:
    return Report.from_json(table(verdict))


def test_junit_counts_failures_and_what_was_not_run() -> None:
    suite = ET.fromstring(junit(told(), [("robust accuracy", False, "0.7 < 0.8")]))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    cases = {case.get("name"): [part.tag for part in case] for case in suite.iter("testcase")}
    assert cases == {
        "finite": ["system-out"],
        "parity": ["skipped"],
        "verdict": ["system-out"],
        "robust accuracy": ["failure"],
    }
    assert suite.find("testcase/system-out").text == "a < b & c"  # type: ignore[union-attr]


def test_junit_fails_where_the_verdict_is_not_valid() -> None:
    """No gate of it failed: one was not run. A reader of this file alone must see that."""
    suite = ET.fromstring(junit(told(verdict="INCONCLUSIVE")))
    assert suite.get("failures") == "1"


def test_the_bill_of_materials_carries_every_figure_with_its_interval() -> None:
    component, tested = bill_of_materials(told())["components"]
    assert (tested["type"], tested["hashes"][0]["content"]) == ("data", "1" * 64)
    assert component["hashes"] == [{"alg": "SHA-256", "content": "0" * 64}]
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [metric["type"] for metric in metrics] == [
        "clean accuracy",
        "robust accuracy, transfer",
        "robust accuracy, white-box",
        "robust accuracy, all",
        "robust accuracy, queries for scores",
        "robust accuracy, queries for labels",
        "robust accuracy, substitute",
    ]
    assert metrics[1]["value"] == "0.7000"
    assert metrics[1]["confidenceInterval"] == {"lowerBound": "0.6500", "upperBound": "0.7500"}
    assert metrics[0]["slice"] == "d, test, 100 images"
    assert metrics[1]["slice"] == "d, test, 100 images, Linf eps 0.1"


def test_the_bill_of_materials_names_what_the_provenance_knows() -> None:
    made_from = made(licence="Apache-2.0", data_licence="CC BY 4.0")
    bill = bill_of_materials(told(), made_from)
    model, *materials = bill["components"]
    assert model["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    found = {each["name"]: each for each in materials}
    trained = found["zoo photos, train"]
    assert trained["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert trained["licenses"] == [{"license": {"name": "CC BY 4.0"}}]
    assert {"name": "dverge:images of cat", "value": "50"} in trained["properties"]
    assert found["begin.safetensors"]["hashes"][0]["content"] == "c" * 64
    assert found["numpy"]["purl"].startswith("pkg:pypi/numpy@")
    (depends, *_) = bill["dependencies"]
    assert depends["ref"] == model["bom-ref"]
    assert set(depends["dependsOn"]) == {each["bom-ref"] for each in materials}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("white_box", [True, False])
def test_the_bill_of_materials_is_cyclonedx(white_box: bool, known: bool) -> None:
    """By the official schema, with nothing in it that the schema does not know."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    version = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    report = Report.from_json(table(white_box=white_box))
    bill = bill_of_materials(report, made(data_licence="CC BY 4.0") if known else None)
    validator = validation.JsonStrictValidator(version)
    assert validator.validate_str(json.dumps(bill)) is None
    assert validator.validate_str(json.dumps(bill | {"verdict": "VALID"})) is not None
