"""Tensors of the Open Inference Protocol V2, as JSON and as the binary extension has them.

A request is parsed for its outline alone: what a field holds stays text until it is known how much
of it there may be. Numbers are decoded a piece at a time, so that other threads run in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Raw

from dverge_serve.serving.responses import ServiceError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
# Most bytes of JSON in any field but the data, and most commas in all those fields together.
FIELD_BYTES, FIELD_COMMAS = 4096, 4096
# Numbers decoded in one call, during which no other thread runs: the slowest ones take 3 ms.
PIECE = 256
_ABSENT = Raw()
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))


class _Tensor(msgspec.Struct):
    name: Raw = _ABSENT
    shape: Raw = _ABSENT
    datatype: Raw = _ABSENT
    parameters: Raw = _ABSENT
    data: Raw = _ABSENT


class _Outline(msgspec.Struct):
    inputs: tuple[_Tensor]
    id: Raw = _ABSENT
    parameters: Raw = _ABSENT
    outputs: Raw = _ABSENT


_OUTLINE = msgspec.json.Decoder(_Outline)
_NUMBERS = msgspec.json.Decoder(list[float])


@dataclass(frozen=True, slots=True)
class Inference:
    """An inference request, checked.

    Args:
        images: float32 `[batch, channels, height, width]` in `[0,1]`.
        outputs: the outputs asked for in order, each with whether it shall be binary.
        id: the caller's own name for the request, sent back.
    """

    images: Floats
    outputs: dict[str, bool]
    id: str | None


def read_inference(
    body: bytes,
    header_length: int | None,
    *,
    name: str,
    shape: tuple[int, int, int],
    max_images: int,
    outputs: Sequence[str],
) -> Inference:
    """Read and check an inference request.

    Args:
        body: JSON, followed by binary tensors if `header_length` says where the JSON ends.
        header_length: bytes of JSON; None where the whole body is JSON.
        name: the model's input.
        shape: channels, height, width; other shapes are refused, never reshaped.
        max_images: most images.
        outputs: what may be asked for; all of it where the request names none.

    Raises:
        ServiceError: anything else than what was expected, in words.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise _bad(f"the JSON is said to take {header_length} of {len(body)} bytes")
    text = body if header_length is None else body[:header_length]
    request = _outline(text, name, max_images * math.prod(shape))
    (tensor,) = request.inputs
    for field, expected in (("name", name), ("datatype", "FP32")):
        found = _decoded(getattr(tensor, field), field)
        if found != expected:
            raise _bad(f"the input's {field} is {_shown(found)}; expected '{expected}'")
    full = _shape(_decoded(tensor.shape, "shape"), name, shape, max_images)
    blob = b"" if header_length is None else memoryview(body)[header_length:]
    images = _values(tensor, full, blob)
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # also false for NaN
        raise _bad(f"'{name}' holds values from {low:g} to {high:g}; expected numbers in [0, 1]")
    identity = _decoded(request.id, "id")
    if identity is not None and not isinstance(identity, str):
        raise _bad("'id' is not a string")
    asked = _decoded(request.outputs, "outputs")
    every = _flag(_decoded(request.parameters, "parameters"), "binary_data_output")
    return Inference(images, _outputs(asked, every, outputs), identity)


def write_tensors(tensors: dict[str, Array], binary: dict[str, bool]) -> tuple[list[Any], bytes]:
    """Return the JSON forms of `tensors`, and the bytes that follow for those that are binary."""
    described: list[Any] = []
    blobs: list[bytes] = []
    for name, array in tensors.items():
        form: dict[str, Any] = {"name": name, "datatype": datatype(array)}
        form["shape"] = list(array.shape)
        if binary[name]:
            blobs.append(_bytes(array))
            form["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            form["data"] = array.ravel().tolist()
        described.append(form)
    return described, b"".join(blobs)


def datatype(array: Array) -> str:
    """Return the protocol's name of an array's type."""
    return {"f4": "FP32", "i8": "INT64", "b1": "BOOL", "O": "BYTES"}[array.dtype.str.lstrip("<|")]


def _outline(text: bytes, name: str, numbers: int) -> _Outline:
    # Every value but the last of a list or an object is followed by a comma.
    if text.count(b",") > numbers + FIELD_COMMAS:
        raise _bad(f"the request holds more values than any batch has; expected at most {numbers}")
    try:
        return _OUTLINE.decode(text)
    except msgspec.ValidationError as error:
        raise _bad(f"expected an object with exactly one input, '{name}' ({error})") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad("the request is not valid JSON") from error


def _decoded(field: Raw, name: str) -> Any:
    """Return the value of a field, None where it is absent."""
    text = bytes(field)
    if len(text) > FIELD_BYTES:
        raise _bad(f"'{name}' takes {len(text)} bytes; expected at most {FIELD_BYTES}")
    try:
        return msgspec.json.decode(text) if text else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"'{name}' is not valid JSON") from error


def _shape(
    value: Any, name: str, shape: tuple[int, int, int], max_images: int
) -> tuple[int, int, int, int]:
    wanted = f"[batch, {', '.join(map(str, shape))}]"
    whole = isinstance(value, list) and all(type(side) is int for side in value)
    if not whole or len(value) != 4 or tuple(value[1:]) != shape or value[0] < 1:
        raise _bad(f"'{name}' has shape {_shown(value)}; expected {wanted}")
    if value[0] > max_images:
        raise ServiceError(
            "too_many_images", f"{value[0]} images in one request; expected at most {max_images}"
        )
    return (value[0], *shape)


def _values(tensor: _Tensor, shape: tuple[int, int, int, int], blob: Any) -> Floats:
    count = math.prod(shape)
    parameters = _decoded(tensor.parameters, "parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    data = bytes(tensor.data)
    if size is not None:
        if data:
            raise _bad("the input has both 'data' and 'binary_data_size'")
        if type(size) is not int or size != 4 * count or len(blob) != size:
            raise _bad(
                f"binary_data_size is {_shown(size)} and {len(blob)} bytes follow the JSON; "
                f"expected {4 * count} for shape {list(shape)}"
            )
        # Behind a header of any length the floats need not lie where the engine can read them.
        return np.require(np.frombuffer(blob, dtype="<f4").reshape(shape), np.float32, ["A", "C"])
    if len(blob):
        raise _bad("bytes follow the JSON but the input has no 'binary_data_size'")
    # What is left of a list without its numbers: brackets and commas, which tell its shape.
    if data.translate(None, _NOT_STRUCTURE) not in (_brackets((count,)), _brackets(shape)):
        raise _bad(
            f"'data' does not have shape {list(shape)}, nor is it that many numbers in a row"
        )
    return _numbers(data.translate(None, b"[]"), count).reshape(shape)


def _brackets(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of nested lists of this shape."""
    inner = b""
    for side in reversed(shape):
        inner = b"[" + ((inner + b",") * side)[:-1] + b"]"
    return inner


def _numbers(text: bytes, count: int) -> Floats:
    """Return `count` JSON numbers with commas between them."""
    commas = np.flatnonzero(np.frombuffer(text, np.uint8) == ord(","))
    ends = [*commas[PIECE - 1 :: PIECE].tolist(), len(text)]
    found = np.empty(count, np.float32)
    begin = 0
    for at, end in zip(range(0, count, PIECE), ends, strict=True):
        try:
            piece = _NUMBERS.decode(b"[" + text[begin:end] + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _bad("'data' holds something else than finite numbers") from error
        if not piece:  # an empty list where a number should be
            raise _bad("'data' lacks a number")
        with np.errstate(over="ignore"):  # too large is infinite, which the caller refuses
            found[at : at + PIECE] = piece
        begin = end + 1
    return found


def _outputs(asked: Any, every: bool, known: Sequence[str]) -> dict[str, bool]:
    if asked is None or asked == []:
        return dict.fromkeys(known, every)
    if not isinstance(asked, list) or not all(isinstance(output, dict) for output in asked):
        raise _bad("'outputs' is not a list of objects")
    found: dict[str, bool] = {}
    for output in asked:
        name, parameters = output.get("name"), output.get("parameters")
        if name not in known or name in found:
            raise _bad(f"output {_shown(name)}; expected some of {', '.join(known)}, each once")
        found[name] = _flag(parameters, "binary_data", every)
        if "classification" in (parameters or {}):
            raise _bad("the classification extension is not served; ask for 'probabilities'")
    return found


def _flag(parameters: Any, key: str, default: bool = False) -> bool:
    if parameters is None:
        return default
    if not isinstance(parameters, dict) or type(parameters.get(key, default)) is not bool:
        raise _bad(f"'parameters' is not an object with a true or false '{key}'")
    return bool(parameters.get(key, default))


def _bytes(array: Array) -> bytes:
    if array.dtype == object:  # BYTES: each value behind its length, 4 bytes little-endian
        parts = [text.encode() for text in array.ravel()]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return array.tobytes()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bad(message: str) -> ServiceError:
    return ServiceError("bad_tensor", message)
