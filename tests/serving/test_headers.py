"""What answers carry beside their body, and the token that requests do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dverge_serve.files import sha256
from tests.serving.conftest import Start
from tests.serving.refusal import refusal

pytestmark = pytest.mark.anyio


async def test_head_is_get_without_the_body(start: Start) -> None:
    client = await start()
    got, headed = await client.get("/model"), await client.head("/model")
    assert headed.status_code == 200
    assert headed.content == b""
    assert headed.headers["content-length"] == got.headers["content-length"]


async def test_request_ids_are_kept_if_sound_and_made_if_not(start: Start) -> None:
    client = await start()
    sound = "Ab-09" * 12
    for path in ("/livez", "/nothing"):
        answer = await client.get(path, headers={"x-request-id": sound})
        assert answer.headers["x-request-id"] == sound
        for unsound in ("", "a" * 65, "a b", "a;b", "x_y"):
            answer = await client.get(path, headers={"x-request-id": unsound})
            assert re.fullmatch("[A-Za-z0-9-]{1,64}", answer.headers["x-request-id"])
            assert answer.headers["x-request-id"] != unsound
    made = {(await client.get("/livez")).headers["x-request-id"] for _ in range(10)}
    assert len(made) == 10


async def test_every_answer_names_the_model_file(start: Start, gray_model: Path) -> None:
    client = await start()
    digest = sha256(gray_model.read_bytes())
    for path in ("/livez", "/predict", "/nothing", "/model", "/"):
        assert (await client.get(path)).headers["x-model-sha256"] == digest


async def test_the_token_guards_all_but_probes_and_static_pages(start: Start) -> None:
    client = await start(token="s3cret")
    for path in ("/livez", "/readyz", "/", "/demo", "/openapi.json", "/docs.json"):
        assert (await client.get(path)).status_code == 200, path
    bad = ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret"]
    for path in ("/model", "/report", "/metrics", "/predict", "/nothing"):
        for value in bad:
            answer = await client.get(path, headers={"authorization": value})
            refusal(answer, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer"):
        answer = await client.get("/model", headers={"authorization": f"{scheme} s3cret"})
        assert answer.status_code == 200
    assert "tiny" not in (await client.get("/")).text


async def test_the_admin_token_alone_opens_reload_and_metrics(start: Start) -> None:
    client = await start(token="caller", admin_token="admin")
    caller, admin = ({"authorization": f"Bearer {each}"} for each in ("caller", "admin"))
    for method, path in (("GET", "/metrics"), ("POST", "/admin/reload")):
        refusal(await client.request(method, path, headers=caller), "unauthorized")
        assert (await client.request(method, path, headers=admin)).status_code == 200
    assert (await client.get("/model", headers=caller)).status_code == 200
    for path in ("/model", "/nothing"):
        refusal(await client.get(path, headers=admin), "unauthorized")
    document = (await client.get("/openapi.json")).json()
    assert document["paths"]["/metrics"]["get"]["security"] == [{"admin_token": []}]
    assert document["paths"]["/predict"]["post"]["security"] == [{"token": []}]


async def test_without_a_token_for_callers_the_admin_token_guards_its_routes(start: Start) -> None:
    client = await start(admin_token="admin")
    assert (await client.get("/model")).status_code == 200
    refusal(await client.get("/metrics"), "unauthorized")
    refusal(await client.post("/admin/reload"), "unauthorized")
    refusal(await client.get("/nothing"), "not_found")
