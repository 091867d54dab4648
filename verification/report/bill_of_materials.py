"""The bill of materials of a verified model: CycloneDX 1.6 with its model card (ML-BOM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dverge_serve import __version__
from dverge_serve.engine.rates import Rate
from dverge_serve.engine.report import Report

USES = ["image classification where inputs may be adversarial"]
NOT_COVERED = "not measured: "


def bill_of_materials(
    report: Report, provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the model was made from, and its figures as performance metrics.

    Args:
        report: of the model.
        provenance: of the same file, as `read_provenance` returns it: the training images, the
            members and the packages that made it. None where it is not known.
    """
    materials = [*_data(report, provenance), *_made_with(provenance)]
    model = f"model-{report.model.sha256[:16]}"
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
        "components": [_model(report, provenance, model), *materials],
        "dependencies": [
            {"ref": model, "dependsOn": [each["bom-ref"] for each in materials]},
            *({"ref": each["bom-ref"]} for each in materials),
        ],
    }


def _model(report: Report, provenance: Mapping[str, Any] | None, ref: str) -> dict[str, Any]:
    model, table = report.model, report.to_json()
    definition = _definition(provenance)
    settings = definition.get("externalParameters", {}).get("training", {})
    licence = definition.get("internalParameters", {}).get("licence")
    architecture = settings.get("architecture")
    parameters = {
        "approach": {"type": "supervised"},
        "task": "image classification",
        "architectureFamily": "ensemble of convolutional networks",
        "datasets": [{"ref": each["bom-ref"]} for each in _data(report, provenance)],
        "inputs": [{"format": "float32 [batch, channels, height, width] in [0,1]"}],
        "outputs": [
            {"format": "logits float32 [batch, classes], the mean of the members'"},
            {"format": "member_logits float32 [batch, members, classes]"},
        ],
    }
    if architecture:
        named = architecture if isinstance(architecture, str) else ", ".join(architecture)
        parameters["modelArchitecture"] = f"{model.members} members: {named}"
    properties = {
        "verdict": report.verdict,
        "preset": report.preset,
        "precision": model.precision,
        "configuration_sha256": report.configuration_sha256,
        **{f"gate:{gate.name}": _WORDS[gate.passed] for gate in report.gates},
        **{
            f"identifier:{figure}": "; ".join(names)
            for figure, names in table.get("identifiers", {}).items()
        },
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": model.name,
        "version": model.weights_sha256[:16],
        "hashes": [_sha256(model.sha256)],
        **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(report))},
            "considerations": {
                "useCases": USES,
                "technicalLimitations": [
                    NOT_COVERED + limit for limit in table.get("out_of_scope", ())
                ],
            },
        },
        "properties": [
            {"name": f"dverge:{name}", "value": value} for name, value in properties.items()
        ],
    }


_WORDS = {True: "passed", False: "failed", None: "not run"}


def _metrics(report: Report) -> Iterator[dict[str, Any]]:
    """Yield every figure with its interval; the slice says of which images, threat and radius."""
    images = f"{report.data.name}, {report.data.part}, {report.data.n} images"
    yield _metric("clean accuracy", report.clean_accuracy, images)
    if more := report.more_clean_images:
        where = f"{report.data.name}, {report.data.part}, {more.model.n} images"
        yield _metric("clean accuracy", more.model, where)
    for eps, row in report.robust_accuracy.items():
        where = f"{images}, {report.norm} eps {eps:g}"
        rates = {"transfer": row.transfer, "white-box": row.white_box, "all": row.all}
        for threat, rate in rates.items():
            if rate is not None:
                yield _metric(f"robust accuracy, {threat}", rate, where)
    for asked in report.by_queries:
        point = asked.points[-1]
        where = (
            f"{report.data.name}, {report.data.part}, {point.n} images, "
            f"{report.norm} eps {asked.eps:g}, {point.queries} queries"
        )
        yield _metric(f"robust accuracy, queries for {asked.answers}", point, where)
    if report.substitute is not None:
        for eps, robust in report.substitute.robust_accuracy.items():
            where = f"{images}, {report.norm} eps {eps:g}, {report.substitute.queries} queries"
            yield _metric("robust accuracy, substitute", robust, where)


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


def _data(report: Report, provenance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the images that were attacked, and those that the model was trained on."""
    tested = report.data
    found = [_dataset("test", f"{tested.name}, {tested.part}", tested.sha256, {"images": tested.n})]
    if provenance is not None:
        trained = _definition(provenance)["resolvedDependencies"][0]
        sha256 = trained.get("digest", {}).get("sha256")
        name = f"{trained['name']}, train"
        found.append(_dataset("train", name, sha256, trained.get("annotations", {})))
    return found


def _dataset(part: str, name: str, sha256: str | None, notes: Mapping[str, Any]) -> dict[str, Any]:
    licence = notes.get("licence")
    told = {key: value for key, value in notes.items() if isinstance(value, int)}
    told |= {f"images of {name}": n for name, n in notes.get("class_counts", {}).items()}
    return {
        "type": "data",
        "bom-ref": f"data-{part}",
        "name": name,
        **({"hashes": [_sha256(sha256)]} if sha256 else {}),
        **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
        "data": [{"type": "dataset", "name": name}],
        "properties": [{"name": f"dverge:{key}", "value": str(n)} for key, n in told.items()],
    }


def _made_with(provenance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the weights that the model was built from, and the packages that built it."""
    if provenance is None:
        return []
    files = [
        {
            "type": "file",
            "bom-ref": f"file-{each['digest']['sha256'][:16]}",
            "name": each["name"],
            "hashes": [_sha256(each["digest"]["sha256"])],
        }
        for each in _definition(provenance)["resolvedDependencies"][1:]
    ]
    builder = provenance["predicate"]["runDetails"]["builder"]
    versions = {"dverge-serve": builder["id"].rpartition("@")[2]} | builder["version"]
    python = versions.pop("python")
    return [
        *files,
        {"type": "platform", "bom-ref": "python", "name": "python", "version": python},
        *(
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{name}@{version}",
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{name}@{version}",
            }
            for name, version in versions.items()
        ),
    ]


def _definition(provenance: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = provenance["predicate"]["buildDefinition"] if provenance else {}
    return found


def _sha256(content: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": content}
