"""The OpenAPI document against the running service: what it says is what happens."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dverge_serve.serving.openapi import openapi
from dverge_serve.serving.settings import Settings
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.server import Server
from tests.serving.tiny import PNG

OPERATIONS = [
    (path, method)
    for path, operations in openapi(Settings(), "full")["paths"].items()
    for method in operations
]
pictures = st.binary(max_size=100) | st.sampled_from([tiny.png(0), tiny.png(255), b""])
for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, pictures)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_route_keeps_its_contract(server: Server, path: str, method: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = set()

    @given(case=schema[path][method].as_strategy())
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    def keeps(case: schemathesis.Case[Any]) -> None:
        answer = case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
                unsupported_method,
            ]
        )
        statuses.add(answer.status_code)

    keeps()
    assert statuses  # something was asked


def test_its_examples_are_true_to_its_schemas() -> None:
    for expose in ("label", "scores", "full"):
        document = openapi(Settings(), expose)
        schema = schemathesis.openapi.from_dict(document)
        schema.validate()
        success = document["paths"]["/predict"]["post"]["responses"]["200"]
        example = success["content"]["application/json"]["example"]["predictions"][0]
        described = document["components"]["schemas"]["Predictions"]["properties"]["predictions"]
        assert set(described["items"]["properties"]) == set(example)


@pytest.mark.anyio
async def test_openapi_lists_every_route_of_ours_and_no_other(start: Start) -> None:
    client = await start()
    document = (await client.get("/openapi.json")).json()
    assert (await client.get("/docs.json")).json() == document
    for path, operations in document["paths"].items():
        answer = await client.request("TRACE", path)
        assert answer.status_code == 405, path
        allowed = {method.lower() for method in answer.headers["allow"].split(", ")} - {"head"}
        assert allowed == set(operations)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    described = document["components"]["schemas"]["Predictions"]["properties"]["predictions"]
    assert set(described["items"]["properties"]) == set(answer.json()["predictions"][0])
