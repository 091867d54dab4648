"""`POST /predict` and the model's card: what a caller is told, and how much of it."""

from __future__ import annotations

from typing import Any

from dverge_serve.serving.batching import Images, Part
from dverge_serve.serving.classify import Classifier
from dverge_serve.serving.loaded_model import Rows, ServedModel
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
            files = self._files(request, body)
            return await self._classifier.decoder.decode(files, served.card.preprocess), None

        served, _, part = await self._classifier.classify(request, read)
        return json_response(
            {
                "model": {"name": served.card.name, "sha256": served.sha256},
                "predictions": predictions(part, served, self._classifier.expose),
            }
        )

    def _files(self, request: Request, body: bytes) -> list[bytes]:
        if request.content_type != MULTIPART:
            return [body]
        header = request.headers[b"content-type"].decode("latin-1")
        return image_files(body, header, self._classifier.settings.max_images)


def predictions(part: Part[Rows], served: ServedModel, expose: Exposure) -> list[dict[str, Any]]:
    """Return the JSON form of a job's rows, holding no more than `expose` allows."""
    labels = served.card.labels
    rows = part.result
    found = []
    for row in range(part.start, part.stop):
        top = rows.top[row]
        answer: dict[str, Any] = {"label": labels[top[0]], "index": top[0]}
        if expose != "label":
            probabilities = rows.top_probabilities[row]
            answer["probability"] = probabilities[0]
            answer["top"] = [
                {"label": labels[index], "index": index, "probability": probability}
                for index, probability in zip(top, probabilities, strict=True)
            ]
        if expose == "full":
            answer["agreement"] = rows.agreement[row]
            answer["disagreement"] = rows.disagreement[row]
            votes = zip(rows.votes[row], rows.vote_probabilities[row], strict=True)
            answer["votes"] = [
                {"label": labels[index], "index": index, "probability": probability}
                for index, probability in votes
            ]
            if served.threshold is not None:
                answer["suspicious"] = served.is_suspicious(rows.disagreement[row])
        found.append(answer)
    return found


def model_card(served: ServedModel, expose: Exposure) -> dict[str, Any]:
    """Return the JSON form of the model's card: what the file is, and its report's headline."""
    card = served.card.to_json()
    if expose != "full":
        # Seeds and settings are all it takes to train the same members at home.
        del card["training"]
    card["sha256"] = served.sha256
    card["provider"] = served.engine.provider
    if expose != "label":
        card["report"] = served.headline
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
    coding = request.headers.get(b"content-encoding", b"identity").strip().lower()
    if coding != b"identity":
        raise ServiceError(
            "unsupported_content_type", "the body is content-encoded; expected plain"
        )
