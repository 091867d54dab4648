"""Tensors of the Open Inference Protocol V2, as JSON and as the binary extension has them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dverge_serve.serving.responses import ServiceError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


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
    request = _json(body if header_length is None else body[:header_length])
    tensors = request.get("inputs")
    if not (isinstance(tensors, list) and len(tensors) == 1 and isinstance(tensors[0], dict)):
        raise _bad(f"expected exactly one input, '{name}'")
    tensor = tensors[0]
    if tensor.get("name") != name:
        raise _bad(f"the input is named {_shown(tensor.get('name'))}; expected '{name}'")
    if tensor.get("datatype") != "FP32":
        raise _bad(f"'{name}' has datatype {_shown(tensor.get('datatype'))}; expected 'FP32'")
    full = _shape(tensor.get("shape"), name, shape, max_images)
    blob = b"" if header_length is None else memoryview(body)[header_length:]
    images = _values(tensor, full, blob)
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # also false for NaN
        raise _bad(f"'{name}' holds values from {low:g} to {high:g}; expected numbers in [0, 1]")
    identity = request.get("id")
    if identity is not None and not (isinstance(identity, str) and _encodes(identity)):
        raise _bad("'id' is not a string of Unicode characters")
    return Inference(images, _outputs(request, outputs), identity)


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


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _bad("the request is not valid JSON") from error
    if not isinstance(value, dict):
        raise _bad("the request is not a JSON object")
    return value


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


def _values(tensor: dict[str, Any], shape: tuple[int, int, int, int], blob: Any) -> Floats:
    count = math.prod(shape)
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if "data" in tensor:
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
    try:
        values = np.asarray(tensor.get("data"))
    except ValueError as error:  # lists of unequal lengths
        raise _bad("'data' is not a regular array") from error
    if values.dtype.kind not in "iuf":  # strings, booleans and objects would convert, wrongly
        raise _bad("'data' holds something else than numbers")
    if values.shape not in (shape, (count,)):
        raise _bad(
            f"'data' has shape {list(values.shape)}; expected {list(shape)}, or it flattened"
        )
    with np.errstate(over="ignore"):  # too large is infinite, which the engine refuses
        return values.astype(np.float32).reshape(shape)


def _outputs(request: dict[str, Any], known: Sequence[str]) -> dict[str, bool]:
    every = _flag(request, "binary_data_output")
    asked = request.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(known, every)
    if not isinstance(asked, list) or not all(isinstance(output, dict) for output in asked):
        raise _bad("'outputs' is not a list of objects")
    found: dict[str, bool] = {}
    for output in asked:
        name = output.get("name")
        if name not in known or name in found:
            raise _bad(f"output {_shown(name)}; expected some of {', '.join(known)}, each once")
        found[name] = _flag(output, "binary_data", every)
        if "classification" in (output.get("parameters") or {}):
            raise _bad("the classification extension is not served; ask for 'probabilities'")
    return found


def _flag(holder: dict[str, Any], key: str, default: bool = False) -> bool:
    parameters = holder.get("parameters")
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


def _encodes(text: str) -> bool:
    """Return whether `text` can be UTF-8: JSON's escapes can spell half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bad(message: str) -> ServiceError:
    return ServiceError("bad_tensor", message)
