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

from dverge_serve.serving.app import App
from dverge_serve.serving.settings import Exposure, Settings
from dverge_serve.serving.worker import Worker
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.server import Server
from tests.serving.tiny import PNG

# Of the route table, not of the document: a route that the document lacks fails.
TABLE = App(Worker(Settings()), expose="full").routes
ROUTES = [(route.path, route.method) for route in TABLE.values()]
pictures = st.binary(max_size=100) | st.sampled_from([tiny.png(0), tiny.png(255), b""])
for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, pictures)


@pytest.mark.parametrize(("path", "method"), ROUTES)
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


@pytest.mark.parametrize("expose", ["label", "scores", "full"])
def test_its_examples_are_true_to_its_schemas(expose: Exposure) -> None:
    document = App(Worker(Settings()), expose=expose).routes.document
    schemathesis.openapi.from_dict(document).validate()
    success = document["paths"]["/predict"]["post"]["responses"]["200"]
    example = success["content"]["application/json"]["example"]["predictions"][0]
    described = document["components"]["schemas"]["Predictions"]["properties"]["predictions"]
    assert set(described["items"]["properties"]) == set(example)


@pytest.mark.anyio
@pytest.mark.parametrize("token", ["", "s3cret"])
async def test_the_route_table_is_what_is_described_and_what_is_served(
    start: Start, token: str
) -> None:
    routes = App(Worker(Settings(token=token)), expose="full").routes.values()
    client = await start(token=token)
    document = (await client.get("/openapi.json")).json()
    assert (await client.get("/docs.json")).json() == document
    found = {path: set(operations) for path, operations in document["paths"].items()}
    assert found == {route.path: {route.method.lower()} for route in routes}
    for route in routes:
        asked = await client.request("TRACE", route.path)
        assert asked.status_code == (405 if route.public or not token else 401), route.path
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = await client.request("TRACE", route.path, headers=headers)
        assert answer.status_code == 405, route.path
        assert answer.headers["allow"].split(", ") == list(route.methods)
        described = document["paths"][route.path][route.method.lower()]
        assert (
            ("security" in described)
            == ("401" in described["responses"])
            == (bool(token) and not route.public)
        )


@pytest.mark.anyio
async def test_a_prediction_has_the_described_fields(start: Start) -> None:
    client = await start()
    document = (await client.get("/openapi.json")).json()
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    described = document["components"]["schemas"]["Predictions"]["properties"]["predictions"]
    assert set(described["items"]["properties"]) == set(answer.json()["predictions"][0])


@pytest.mark.anyio
async def test_the_card_has_the_described_fields(start: Start) -> None:
    client = await start()
    document = (await client.get("/openapi.json")).json()
    card = (await client.get("/model")).json()
    assert set(card) == set(document["components"]["schemas"]["Card"]["properties"])
