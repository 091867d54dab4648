"""Multipart bodies: the `images` of one request."""

from __future__ import annotations

from python_multipart.multipart import parse_options_header

from dverge_serve.serving.responses import ServiceError

FIELD = "images"
# RFC 2046, section 5.1.1, allows boundaries of 70 characters.
MOST_TYPE, MOST_BOUNDARY, MOST_HEADERS = 1024, 70, 4096


def image_files(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """Return the contents of the parts named `images`, in order.

    The body is split at its delimiters, which takes as long whatever it holds; a parser that calls
    back for every piece of a part takes seconds where nearly every byte begins like a delimiter.

    Args:
        body: the whole body; the caller has bounded it.
        content_type: the header with its boundary.
        max_images: most parts.

    Raises:
        ServiceError: not valid multipart, a part of another name, no part, or too many.
    """
    # A delimiter begins with the end of the line before it, even where there is none.
    delimiter = b"\r\n--" + _boundary(content_type)
    _, *parts = (b"\r\n" + body).split(delimiter, max_images + 2)
    files: list[bytes] = []
    for part in parts:
        if part.startswith(b"--"):  # the last delimiter; what follows it is not looked at
            break
        if len(files) == max_images:
            raise ServiceError("too_many_images", f"too many images; expected at most {max_images}")
        files.append(_content(part))
    else:
        raise _bad("the multipart body stops before its end" if parts else "no part begins")
    if not files:
        raise ServiceError("no_images", f"no part is named '{FIELD}'; expected at least one")
    return files


def _boundary(content_type: str) -> bytes:
    if len(content_type) > MOST_TYPE:
        raise _bad(f"the content-type has {len(content_type)} bytes; expected {MOST_TYPE} at most")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= MOST_BOUNDARY:
        raise _bad(f"the content-type names no boundary of 1 to {MOST_BOUNDARY} characters")
    return boundary


def _content(part: bytes) -> bytes:
    """Return what a part holds, once its headers name it rightly."""
    head, blank, content = part.partition(b"\r\n\r\n")
    if not blank or len(head) > MOST_HEADERS:
        raise _bad(f"a part has no end of its headers within {MOST_HEADERS} bytes")
    rest, *lines = head.split(b"\r\n")
    if rest.strip(b" \t"):
        raise _bad("something follows a boundary on its line")
    name = b""
    for line in lines:
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            name = parse_options_header(value)[1].get(b"name", b"")
    if name != FIELD.encode():
        shown = name.decode("utf-8", "replace")[:40]
        raise _bad(f"a part is named '{shown}'; expected '{FIELD}'")
    return content


def _bad(message: str) -> ServiceError:
    return ServiceError("bad_multipart", message)
