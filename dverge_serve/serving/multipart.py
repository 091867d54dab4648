"""Multipart bodies: the `images` of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


from dverge_serve.serving.responses import ServiceError

FIELD = "images"


def image_files(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """Return the contents of the parts named `images`, in order.

    Args:
        body: the whole body; the caller has bounded it.
        content_type: the header with its boundary.
        max_images: most parts.

    Raises:
        ServiceError: not valid multipart, a part of another name, no part, or too many.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise ServiceError("bad_multipart", "the content-type names no boundary")
    reader = _Reader(max_images)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ServiceError("bad_multipart", "the body is not valid multipart/form-data") from error
    if not reader.ended:
        raise ServiceError("bad_multipart", "the multipart body stops before its end")
    if not reader.files:
        raise ServiceError("no_images", f"no part is named '{FIELD}'; expected at least one")
    return reader.files


class _Reader:
    """Gathers parts from the parser's callbacks, which hand over slices of the body."""

    def __init__(self, max_images: int) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._max_images = max_images
        self._slices: list[bytes] = []
        self._header = b""
        self._value = b""
        self._name: bytes | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        if len(self.files) == self._max_images:
            raise ServiceError(
                "too_many_images", f"too many images; expected at most {self._max_images}"
            )
        self._slices, self._name = [], None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name")
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        if self._name != FIELD.encode():
            name = (self._name or b"").decode("utf-8", "replace")[:40]
            raise ServiceError("bad_multipart", f"a part is named '{name}'; expected '{FIELD}'")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._slices.append(data[start:end])

    def _on_part_end(self) -> None:
        self.files.append(b"".join(self._slices))

    def _on_end(self) -> None:
        self.ended = True
