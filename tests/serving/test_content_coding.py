"""Compressed requests of the Open Inference Protocol V2."""

from __future__ import annotations

import gzip
import json
import zlib

import httpx
import pytest

from tests.serving.conftest import Start
from tests.serving.test_oip import INFER, LENGTH, batch, binary, refused, request


@pytest.mark.anyio
async def test_compressed_requests_are_unpacked_within_the_limit(start: Start) -> None:
    client = await start(max_body_bytes=5000)
    body = json.dumps(request()).encode()
    values = batch(0.0).tobytes()
    header = binary(values)

    async def post(content: bytes, coding: str, **headers: str) -> httpx.Response:
        headers = {"content-encoding": coding, **headers}
        return await client.post(INFER, content=content, headers=headers)

    for coding, packed in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        assert (await post(packed(body), coding)).json()["outputs"][0]["data"] == ["bright"]
        both = packed(header + values)
        answer = await post(both, coding, **{LENGTH: str(len(header))})
        assert answer.json()["outputs"][0]["data"] == ["dark"]
        fits, long = (packed(body + b" " * (size - len(body))) for size in (5000, 5001))
        assert (await post(fits, coding)).status_code == 200
        refused(await post(long, coding), "body_too_large")
        refused(await post(packed(bytes(100_000_000))[:4900], coding), "body_too_large")
        for wrong in (b"", body, packed(body)[:-1], packed(body) + b"x", packed(body) * 2):
            refused(await post(wrong, coding), "bad_request")
    refused(await post(body, "br"), "unsupported_content_type")
