"""The OpenAPI description: every route, error and example, as this service is configured."""

from __future__ import annotations

from typing import Any

from dverge_serve import __version__
from dverge_serve.serving.oip import BASE
from dverge_serve.serving.responses import CODES
from dverge_serve.serving.settings import Exposure, Settings

Schema = dict[str, Any]

_NUMBER: Schema = {"type": "number"}
_STRING: Schema = {"type": "string"}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_INDEX: Schema = {"type": "integer", "minimum": 0}
_ANY: Schema = {"type": "object"}
_IMAGE: Schema = {"type": "string", "format": "binary"}
_EXAMPLE_SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def openapi(settings: Settings, expose: Exposure) -> Schema:
    """Return the OpenAPI 3.1 document of a service with these settings."""
    locked = bool(settings.token)
    paths: dict[str, dict[str, Schema]] = {
        "/predict": {"post": _predict(settings, expose)},
        "/model": {
            "get": _operation("The model's card", _json({"$ref": "#/components/schemas/Card"}), 503)
        },
        "/report": {
            "get": _operation(
                "The robustness report of this very model file", _json({"type": "object"}), 404, 503
            )
        },
        "/metrics": {"get": _operation("Prometheus metrics, over all workers", _text())},
        "/livez": {"get": _operation("Whether the process runs", _text())},
        "/readyz": {"get": _operation("Whether the model is loaded and warm", _text(), 503)},
        "/openapi.json": {"get": _operation("This document", _json({"type": "object"}))},
        "/docs.json": {"get": _operation("This document", _json({"type": "object"}))},
        "/v2": {"get": _v2("The server, in the Open Inference Protocol V2", _json(_ANY))},
        "/v2/health/live": {"get": _v2("Whether the process runs", _json(_ANY))},
        "/v2/health/ready": {"get": _v2("Whether the model is loaded and warm", _json(_ANY), 503)},
        BASE: {"get": _v2("The model's inputs and outputs", _json(_ANY), 503)},
        f"{BASE}/ready": {"get": _v2("Whether the model is loaded and warm", _json(_ANY), 503)},
        f"{BASE}/infer": {"post": _infer(settings)},
        "/": {"get": _operation("The start page", {"text/html": {"schema": _STRING}})},
        "/demo": {"get": _operation("A page to try images on", {"text/html": {"schema": _STRING}})},
    }
    if locked:
        reload = _operation("Put the model file now in place in service", _json(_ANY), 409, 503)
        paths["/admin/reload"] = {"post": reload}
    public = {"/livez", "/readyz", "/openapi.json", "/docs.json", "/", "/demo"}
    public |= {"/v2/health/live", "/v2/health/ready"}
    for path, operations in paths.items():
        for operation in operations.values():
            if locked and path not in public:
                operation["security"] = [{"token": []}]
                operation["responses"]["401"] = _refusal(401, v2=path.startswith("/v2"))
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "DVERGE Serve",
            "version": __version__,
            "description": "Image classification by an ensemble that is hard to attack. "
            "Every answer carries X-Request-Id and X-Model-Sha256.",
        },
        "paths": paths,
        "components": {"schemas": _schemas(expose)},
    }
    if locked:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


def _predict(settings: Settings, expose: Exposure) -> Schema:
    operation = _operation(
        "Classify images",
        _json({"$ref": "#/components/schemas/Predictions"}, _example(expose)),
        *(400, 408, 413, 415, 500, 503, 504),
    )
    operation["description"] = (
        f"A body of at most {settings.max_body_bytes} bytes; images of at most "
        f"{settings.max_pixels} pixels, at most {settings.max_images} in multipart. "
        "EXIF orientation is applied, alpha composited on white; animations are refused."
    )
    multipart = {
        "type": "object",
        "required": ["images"],
        "properties": {
            "images": {
                "type": "array",
                "minItems": 1,
                "maxItems": settings.max_images,
                "items": _IMAGE,
            }
        },
        "additionalProperties": False,
    }
    raw = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
    operation["requestBody"] = {
        "required": True,
        "content": {
            **{kind: {"schema": _IMAGE} for kind in raw},
            "multipart/form-data": {"schema": multipart},
        },
    }
    return operation


def _operation(summary: str, content: Schema, *refusals: int) -> Schema:
    responses: Schema = {
        "200": {"description": "OK", "headers": _headers("X-Request-Id"), "content": content}
    }
    for status in refusals:
        responses[str(status)] = _refusal(status)
    return {"summary": summary, "responses": responses}


def _v2(summary: str, content: Schema, *refusals: int) -> Schema:
    operation = _operation(summary, content)
    for status in refusals:
        operation["responses"][str(status)] = _refusal(status, v2=True)
    return operation


def _infer(settings: Settings) -> Schema:
    """Describe the inference route: JSON, and the binary form in words."""
    answer = {
        **_json({"$ref": "#/components/schemas/Inference"}),
        "application/octet-stream": {"schema": _IMAGE},
    }
    operation = _v2("Classify tensors", answer, *(400, 408, 413, 415, 500, 503, 504))
    operation["description"] = (
        f"One input 'images', FP32 of exactly the model's shape, numbers in [0, 1], at most "
        f"{settings.max_images} images. With the header Inference-Header-Content-Length the JSON "
        "takes that many bytes and binary tensors follow it."
    )
    tensor = _object(
        {
            "name": {"const": "images"},
            "datatype": {"const": "FP32"},
            "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
            "data": {"type": "array"},
        }
    )
    request = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": _STRING,
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
        },
    }
    operation["requestBody"] = {
        "required": True,
        "content": {**_json(request), "application/octet-stream": {"schema": _IMAGE}},
    }
    return operation


def _refusal(status: int, *, v2: bool = False) -> Schema:
    codes = [code for code, found in CODES.items() if found == status]
    message = "what was found, and what was expected"
    example: Schema = {"error": {"code": codes[0], "message": message}}
    extra = {401: ["WWW-Authenticate"], 503: ["Retry-After"]}.get(status, [])
    if v2:
        example = {"error": message}
        extra = [*extra, "X-Error-Code"]
    return {
        "description": "One of: " + ", ".join(codes),
        "headers": _headers("X-Request-Id", *extra),
        "content": _json({"$ref": f"#/components/schemas/{'V2Error' if v2 else 'Error'}"}, example),
    }


def _headers(*names: str) -> Schema:
    return {name: {"schema": _STRING} for name in names}


def _json(schema: Schema, example: Any = None) -> Schema:
    media = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"application/json": media}


def _text() -> Schema:
    return {"text/plain": {"schema": _STRING}}


def _schemas(expose: Exposure) -> Schema:
    top: Schema = {"label": _STRING, "index": _INDEX, "probability": _SHARE}
    prediction: Schema = {"label": _STRING, "index": _INDEX}
    if expose != "label":
        prediction["probability"] = _SHARE
        prediction["top"] = {
            "type": "array",
            "minItems": 1,
            "maxItems": 5,
            "items": _object(top),
        }
    required = list(prediction)
    if expose == "full":
        prediction["agreement"] = _SHARE
        prediction["disagreement"] = {"type": "number", "minimum": 0}
        prediction["votes"] = {
            "type": "array",
            "minItems": 1,
            "items": _object(top),
            "description": "each member's own answer, in the members' order; only under "
            "DVERGE_EXPOSE=full",
        }
        required = list(prediction)
        prediction["suspicious"] = {"type": "boolean"}
    model = {"name": _STRING, "sha256": _SHA256}
    return {
        "Predictions": _object(
            {
                "model": _object(model),
                "predictions": {
                    "type": "array",
                    "minItems": 1,
                    "items": _object(prediction, required),
                },
            }
        ),
        "Card": _card(),
        "Error": _object(
            {"error": _object({"code": {"enum": sorted(CODES)}, "message": _STRING})},
        ),
        "V2Error": _object({"error": _STRING}),
        "Inference": {
            "type": "object",
            "required": ["model_name", "model_version", "outputs"],
            "properties": {
                "model_name": {"const": "dverge"},
                "model_version": _STRING,
                "id": _STRING,
                "outputs": {"type": "array", "items": {"type": "object"}},
            },
        },
    }


def _card() -> Schema:
    figure = _object({"value": _NUMBER, "low": _NUMBER, "high": _NUMBER, "n": _INDEX})
    card: Schema = {
        "schema_version": _INDEX,
        "name": _STRING,
        "labels": {"type": "array", "items": _STRING},
        "input_shape": {"type": "array", "items": _INDEX},
        "channel_order": _STRING,
        "preprocess": {"type": "object"},
        "members": _INDEX,
        "combination": _STRING,
        "dataset": _STRING,
        "weights_sha256": _STRING,
        "parent_sha256": {"type": ["string", "null"]},
        "precision": _STRING,
        "tool_version": _STRING,
        "sha256": _SHA256,
    }
    required = list(card)
    card["report"] = {
        "type": ["object", "null"],
        "properties": {"verdict": _STRING, "clean_accuracy": figure},
        "description": "its headline; null: there is none; not there under DVERGE_EXPOSE=label",
    }
    card["training"] = {"type": "object", "description": "only under DVERGE_EXPOSE=full"}
    card["provider"] = _STRING
    # A card says more as models do; what is named here stays.
    return {"type": "object", "properties": card, "required": required}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _example(expose: Exposure) -> Schema:
    prediction: Schema = {"label": "7", "index": 7}
    if expose != "label":
        prediction["probability"] = 0.98
        prediction["top"] = [{"label": "7", "index": 7, "probability": 0.98}]
    if expose == "full":
        votes = [{"label": "7", "index": 7, "probability": share} for share in (0.99, 0.96, 0.98)]
        prediction |= {"agreement": 1.0, "disagreement": 0.004, "votes": votes}
        prediction["suspicious"] = False
    return {"model": {"name": "digits", "sha256": _EXAMPLE_SHA}, "predictions": [prediction]}
