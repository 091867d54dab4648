"""Compressed request bodies: what may be unpacked, and how far."""

from __future__ import annotations

import zlib

from dverge_serve.serving.responses import ServiceError

# What `Content-Encoding` may say: window bits of zlib, which also tell the format apart.
CODINGS = {b"gzip": 31, b"deflate": 15}
# The most that one compressed byte can stand for, by the format itself.
RATIO = 1032


def unpack(body: bytes, coding: bytes, limit: int) -> bytes:
    """Return the content of a compressed body.

    Args:
        body: one gzip member or one zlib stream.
        coding: a key of `CODINGS`.
        limit: most bytes of content; no more is ever unpacked.

    Raises:
        ServiceError: longer, damaged, cut short, or followed by more.
    """
    stream = zlib.decompressobj(CODINGS[coding])
    name = coding.decode()
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise ServiceError("bad_request", f"the body is not valid {name}") from error
    if len(content) > limit:
        raise ServiceError(
            "body_too_large", f"the unpacked body is too large; expected at most {limit} bytes"
        )
    if not stream.eof or stream.unused_data:
        raise ServiceError("bad_request", f"the {name} body is cut short or followed by more")
    return content
