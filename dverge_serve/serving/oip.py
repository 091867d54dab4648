"""The Open Inference Protocol V2, with its binary tensor extension."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dverge_serve import __version__
from dverge_serve.engine.card import INPUT
from dverge_serve.engine.predictions import Predictions
from dverge_serve.serving.batching import Images, Part
from dverge_serve.serving.classify import Classifier
from dverge_serve.serving.content_coding import CODINGS, RATIO, unpack
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.oip_tensors import Array, Inference, read_inference, write_tensors
from dverge_serve.serving.requests import Request
from dverge_serve.serving.responses import JSON, Response, ServiceError, dump, json_response
from dverge_serve.serving.settings import Exposure

MODEL = "dverge"
BASE = f"/v2/models/{MODEL}"
# The same routes, for one version alone.
VERSIONED = f"{BASE}/versions/{{version}}"
HEADER_LENGTH = b"inference-header-content-length"
BINARY = b"application/octet-stream"
TYPES = frozenset({"application/json", "application/octet-stream", ""})
# More JSON than this is read and written off the event loop.
INLINE_BYTES = 16_384
INLINE_VALUES = 2_048

# What each output is: its datatype, and its shape behind the batch.
OUTPUTS: dict[Exposure, tuple[str, ...]] = {
    "label": ("label", "index"),
    "scores": ("label", "index", "probabilities"),
    "full": (
        *("label", "index", "probabilities", "logits", "member_logits"),
        *("agreement", "disagreement", "suspicious"),
    ),
}


class InferenceProtocol:
    """The handlers under `/v2`.

    Args:
        classifier: the model in service, behind the limits.
        check_ready: refuses while any worker still loads.
    """

    def __init__(self, classifier: Classifier, check_ready: Callable[[], None]) -> None:
        self._classifier, self._check_ready = classifier, check_ready

    async def server(self, _: Request) -> Response:
        """Answer `GET /v2`."""
        extensions = ["binary_tensor_data"]
        return json_response({"name": MODEL, "version": __version__, "extensions": extensions})

    async def live(self, _: Request) -> Response:
        """Answer `GET /v2/health/live`."""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """Answer `GET /v2/health/ready` and the model's own `ready`."""
        self._check_ready()
        _check_version(request, self._classifier.model())
        return json_response({"ready": True})

    async def metadata(self, request: Request) -> Response:
        """Answer `GET /v2/models/dverge`."""
        served = self._classifier.model()
        _check_version(request, served)
        shape = [-1, *served.card.input_shape]
        return json_response(
            {
                "name": MODEL,
                "versions": [version(served)],
                "platform": "onnxruntime_onnx",
                "inputs": [{"name": INPUT, "datatype": "FP32", "shape": shape}],
                "outputs": [
                    {"name": name, **described(served)[name]}
                    for name in outputs(served, self._classifier.expose)
                ],
            }
        )

    async def infer(self, request: Request) -> Response:
        """Answer `POST /v2/models/dverge/infer`."""
        if request.content_type not in TYPES:
            raise ServiceError(
                "unsupported_content_type",
                "expected content-type application/json or application/octet-stream",
            )

        coding = request.content_coding
        if coding not in (b"identity", *CODINGS):
            raise ServiceError(
                "unsupported_content_type", "the body is content-encoded; expected gzip or deflate"
            )

        async def read(body: bytes, served: ServedModel) -> tuple[Images, Inference]:
            _check_version(request, served)
            if coding in CODINGS:
                body = await self._unpacked(request, body, coding)
            inference = await self._read(request, body, served)
            return inference.images, inference

        served, inference, part = await self._classifier.classify(request, read)
        write = partial(_written, inference, part, served)
        rows = len(inference.images)
        values = sum(_values(served, name) for name, raw in inference.outputs.items() if not raw)
        if rows * values <= INLINE_VALUES:
            return write()
        return await self._classifier.decoder.off_loop(write)

    async def _unpacked(self, request: Request, body: bytes, coding: bytes) -> bytes:
        classifier = self._classifier
        limit = classifier.settings.max_body_bytes
        room = min(limit, RATIO * len(body))
        classifier.budget.take(room, request)
        content = await classifier.decoder.off_loop(partial(unpack, body, coding, limit))
        classifier.budget.take(len(content) - room, request)
        return content

    async def _read(self, request: Request, body: bytes, served: ServedModel) -> Inference:
        text = request.headers.get(HEADER_LENGTH)
        if text is not None and not (text.isdigit() and len(text) < 18):
            raise ServiceError("bad_tensor", "inference-header-content-length is not a number")
        length = None if text is None else int(text)
        read = partial(
            read_inference,
            body,
            length,
            name=INPUT,
            shape=served.card.input_shape,
            max_images=self._classifier.settings.max_images,
            outputs=outputs(served, self._classifier.expose),
        )
        inline = (len(body) if length is None else length) <= INLINE_BYTES
        return read() if inline else await self._classifier.decoder.off_loop(read)


def _check_version(request: Request, served: ServedModel) -> None:
    """Check that a path's version, if it names one, is in service.

    Raises:
        ServiceError: it is not.
    """
    prefix = f"{BASE}/versions/"
    if request.path.startswith(prefix):
        asked = request.path.removeprefix(prefix).partition("/")[0]
        if asked != version(served):
            raise ServiceError(
                "not_found", f"no such version; the one in service is {version(served)}"
            )


def version(served: ServedModel) -> str:
    """Return the model's version: the start of its file's SHA-256."""
    return served.sha256[:12]


def outputs(served: ServedModel, expose: Exposure) -> tuple[str, ...]:
    """Return the names of the outputs that callers may ask for."""
    names = OUTPUTS[expose]
    return names if served.threshold is not None else tuple(n for n in names if n != "suspicious")


def described(served: ServedModel) -> dict[str, dict[str, Any]]:
    """Return datatype and shape of every output."""
    classes, members = len(served.card.labels), served.card.members
    return {
        "label": {"datatype": "BYTES", "shape": [-1]},
        "index": {"datatype": "INT64", "shape": [-1]},
        "probabilities": {"datatype": "FP32", "shape": [-1, classes]},
        "logits": {"datatype": "FP32", "shape": [-1, classes]},
        "member_logits": {"datatype": "FP32", "shape": [-1, members, classes]},
        "agreement": {"datatype": "FP32", "shape": [-1]},
        "disagreement": {"datatype": "FP32", "shape": [-1]},
        "suspicious": {"datatype": "BOOL", "shape": [-1]},
    }


def _values(served: ServedModel, name: str) -> int:
    shape = described(served)[name]["shape"]
    return int(np.prod(shape[1:], dtype=np.int64))


def _tensor(name: str, part: Part[Predictions], served: ServedModel) -> Array:
    rows = slice(part.start, part.stop)
    scores = part.result.scores
    if name == "label":
        return np.array(part.result.labels()[rows], dtype=object)
    if name == "index":
        return scores.predictions[rows].astype(np.int64)
    if name == "suspicious":
        return np.array([served.is_suspicious(x) for x in part.result.disagreement[rows]])
    return np.asarray(getattr(scores, name)[rows], dtype=np.float32)


def _written(inference: Inference, part: Part[Predictions], served: ServedModel) -> Response:
    tensors = {name: _tensor(name, part, served) for name in inference.outputs}
    forms, blob = write_tensors(tensors, inference.outputs)
    answer: dict[str, Any] = {"model_name": MODEL, "model_version": version(served)}
    if inference.id is not None:
        answer["id"] = inference.id
    header = dump({**answer, "outputs": forms})
    if not any(inference.outputs.values()):
        return Response(200, header, JSON)
    length = ((HEADER_LENGTH, b"%d" % len(header)),)
    return Response(200, header + blob, BINARY, length)
