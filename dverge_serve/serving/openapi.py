"""The OpenAPI description of the routes, as this service is configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dverge_serve import __version__
from dverge_serve.engine.card import model_schema
from dverge_serve.serving.responses import CODES
from dverge_serve.serving.routes import Lock, Route
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


# Media types and schemas of bodies, as a response's or a request's `content`.
OBJECT: Schema = {"application/json": {"schema": _ANY}}
TEXT: Schema = {"text/plain": {"schema": _STRING}}
HTML: Schema = {"text/html": {"schema": _STRING}}
BINARY: Schema = {"application/octet-stream": {"schema": _IMAGE}}


def document(routes: Sequence[Route], settings: Settings, expose: Exposure) -> Schema:
    """Return the OpenAPI 3.1 document of a service with these routes and settings."""
    locks = {route.path: route.lock(settings) for route in routes}
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "DVERGE Serve",
            "version": __version__,
            "description": "Image classification by an ensemble that is hard to attack. "
            "Every answer carries X-Request-Id and X-Model-Sha256.",
        },
        "paths": {
            route.path: {route.method.lower(): _operation(route, locks[route.path])}
            for route in routes
        },
        "components": {"schemas": _schemas(expose)},
    }
    schemes = sorted({lock for lock in locks.values() if lock})
    if schemes:
        bearer = {"type": "http", "scheme": "bearer"}
        found["components"]["securitySchemes"] = dict.fromkeys(schemes, bearer)
    return found


def ref(name: str) -> Schema:
    """Return the content of a JSON body with the named schema of `components`."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def predictions(expose: Exposure) -> Schema:
    """Return the content of an answer of `/predict`, with an example."""
    content = ref("Predictions")
    content["application/json"]["example"] = _example(expose)
    return content


def images(settings: Settings) -> Schema:
    """Return the content of a request with images: raw bytes or multipart."""
    files = {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": _IMAGE}
    raw = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
    return {
        **{kind: {"schema": _IMAGE} for kind in raw},
        "multipart/form-data": {"schema": _object({"images": files})},
    }


def tensors() -> Schema:
    """Return the content of an inference request: JSON, or JSON with binary tensors behind it."""
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
    return {"application/json": {"schema": request}, **BINARY}


def _operation(route: Route, lock: Lock | None) -> Schema:
    v2 = route.path.startswith("/v2")
    success = {"description": "OK", "headers": _headers("X-Request-Id"), "content": route.content}
    errors = [*route.errors, 401] if lock else route.errors
    operation: Schema = {
        "summary": route.summary,
        "responses": {"200": success, **{str(status): _error(status, v2) for status in errors}},
    }
    if "{version}" in route.path:
        operation["parameters"] = [
            {"name": "version", "in": "path", "required": True, "schema": _STRING}
        ]
    if route.description:
        operation["description"] = route.description
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": route.body}
    if lock:
        operation["security"] = [{lock: []}]
    return operation


def _error(status: int, v2: bool) -> Schema:
    codes = [code for code, found in CODES.items() if found == status]
    message = "what was found, and what was expected"
    names = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, [])
    content = ref("V2Error" if v2 else "Error")
    example = message if v2 else {"code": codes[0], "message": message}
    content["application/json"]["example"] = {"error": example}
    return {
        "description": "One of: " + ", ".join(codes),
        "headers": _headers("X-Request-Id", *names, *(["X-Error-Code"] if v2 else [])),
        "content": content,
    }


def _headers(*names: str) -> Schema:
    return {name: {"schema": _STRING} for name in names}


def _schemas(expose: Exposure) -> Schema:
    top: Schema = {"label": _STRING, "index": _INDEX, "probability": _SHARE}
    prediction: Schema = {"label": _STRING, "index": _INDEX}
    if expose != "label":
        prediction["probability"] = _SHARE
        prediction["top"] = {"type": "array", "minItems": 1, "maxItems": 5, "items": _object(top)}
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
    model = _object({"name": _STRING, "sha256": _SHA256})
    found = {"type": "array", "minItems": 1, "items": _object(prediction, required)}
    error = _object({"code": {"enum": sorted(CODES)}, "message": _STRING})
    return {
        "Predictions": _object({"model": model, "predictions": found}),
        "Card": _card(),
        "Error": _object({"error": error}),
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
    """Return the schema of `GET /model`: the model file's metadata and what the service adds."""
    figure = _object({"value": _NUMBER, "low": _NUMBER, "high": _NUMBER, "n": _INDEX})
    card = model_schema()
    properties = card["properties"] | {
        "sha256": _SHA256,
        "provider": _STRING,
        "training": {"type": "object", "description": "only under DVERGE_EXPOSE=full"},
        "report": {
            "type": ["object", "null"],
            "properties": {"verdict": _STRING, "clean_accuracy": figure},
            "description": "its headline; null: there is none; not there under DVERGE_EXPOSE=label",
        },
        "report_state": {
            "enum": ["present", "missing", "foreign"],
            "description": "foreign: the report beside the model is of another file; not there "
            "under DVERGE_EXPOSE=label",
        },
    }
    required = [*(key for key in card["required"] if key != "training"), "sha256"]
    return {"type": "object", "properties": properties, "required": required}


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
