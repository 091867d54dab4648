"""`POST /predict`, and the JSON forms of predictions and of the model's card."""

from __future__ import annotations

from functools import partial
from typing import Any

from dverge_serve.engine.predictions import Prediction
from dverge_serve.serving.batching import Images
from dverge_serve.serving.classify import Classifier
from dverge_serve.serving.decoding import INLINE_BYTES
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.multipart import image_files
from dverge_serve.serving.requests import Request
from dverge_serve.serving.responses import Response, ServiceError, json_response
from dverge_serve.serving.settings import Exposure

MULTIPART = "multipart/form-data"
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
# What a caller may call its bytes; their content decides what they are. "" is no header at all.
RAW_TYPES = frozenset({*IMAGE_TYPES, "image/jpg", "application/octet-stream", ""})


class Predict:
    """The handler of `POST /predict`.

    Args:
        classifier: the model in service, behind the limits.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    async def __call__(self, request: Request) -> Response:
        """Classify the images of one request, in order."""
        _check_type(request)

        async def read(body: bytes, served: ServedModel) -> tuple[Images, None]:
            files = [body]
            if request.content_type == MULTIPART:
                header = request.headers[b"content-type"].decode("latin-1")
                split = partial(image_files, body, header, self._classifier.settings.max_images)
                inline = len(body) <= INLINE_BYTES
                files = split() if inline else await self._classifier.decoder.off_loop(split)
            return await self._classifier.decoder.decode(files, served.card.preprocess), None

        served, _, part = await self._classifier.classify(request, read)
        return json_response(
            {
                "model": {"name": served.card.name, "sha256": served.sha256},
                "predictions": [
                    exposed(part.result[row], served, self._classifier.expose)
                    for row in range(part.start, part.stop)
                ],
            }
        )


def exposed(prediction: Prediction, served: ServedModel, expose: Exposure) -> dict[str, Any]:
    """Return the JSON form of a model's prediction, holding no more than `expose` allows."""
    found: dict[str, Any] = {"label": prediction.label, "index": prediction.index}
    if expose != "label":
        found["probability"] = prediction.probability
        found["top"] = prediction.top
    if expose == "full":
        found["agreement"] = prediction.agreement
        found["disagreement"] = prediction.disagreement
        found["votes"] = prediction.votes
        if served.threshold is not None:
            found["suspicious"] = served.is_suspicious(prediction.disagreement)
    return found


def model_card(served: ServedModel, expose: Exposure) -> dict[str, Any]:
    """Return the JSON form of the model's card: what the file is, and its report's headline."""
    card = served.card.to_json()
    if expose != "full":
        # With seeds and settings anyone could train the same members.
        del card["training"]
    card["sha256"] = served.sha256
    card["provider"] = served.engine.provider
    if expose != "label":
        card["report"] = served.report.headline
        card["report_state"] = served.report.state
    return card


def _check_type(request: Request) -> None:
    kind = request.content_type
    if kind != MULTIPART and kind not in RAW_TYPES:
        shown = kind[:60] if kind.isprintable() else "not readable"
        raise ServiceError(
            "unsupported_content_type",
            f"content-type is '{shown}'; expected {', '.join(IMAGE_TYPES)}, "
            f"application/octet-stream or {MULTIPART}",
        )
    if request.content_coding != b"identity":
        raise ServiceError(
            "unsupported_content_type", "the body is content-encoded; expected plain"
        )
