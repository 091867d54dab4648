"""The routes of one version of the model."""

from __future__ import annotations

import pytest

from tests.serving.conftest import Start
from tests.serving.test_oip import INFER, refused, request


@pytest.mark.anyio
async def test_the_version_in_service_has_routes_and_no_other(start: Start) -> None:
    client = await start()
    model = (await client.get("/v2/models/dverge")).json()
    base = f"/v2/models/dverge/versions/{model['versions'][0]}"
    assert (await client.get(base)).json() == model
    assert (await client.get(f"{base}/ready")).status_code == 200
    answer = await client.post(f"{base}/infer", json=request())
    assert answer.json() == (await client.post(INFER, json=request())).json()
    for other in ("1", "", "x" * 1000, "%2F"):
        wrong = f"/v2/models/dverge/versions/{other}"
        for answer in (
            await client.get(f"{wrong}/ready"),
            await client.post(f"{wrong}/infer", json=request()),
        ):
            refused(answer, "not_found")
    refused(await client.get(f"{base}/other"), "not_found")
    text = (await client.get("/metrics")).text
    assert 'route="/v2/models/dverge/versions/{version}/infer"' in text
    assert f"versions/{model['versions'][0]}" not in text
