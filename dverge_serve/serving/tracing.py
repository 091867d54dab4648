"""OpenTelemetry tracing, on if `OTEL_EXPORTER_OTLP_ENDPOINT` is set."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from dverge_serve.errors import UserError

if TYPE_CHECKING:
    from dverge_serve.serving.app import App

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def wanted() -> bool:
    """Whether the environment asks for tracing."""
    named = any(os.environ.get(name) for name in ENDPOINTS)
    return named and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def check() -> None:
    """Check that the exporter is installed if tracing is wanted.

    Raises:
        UserError: the exporter is not installed.
    """
    try:
        found = not wanted() or importlib.util.find_spec(EXPORTER)
    except ModuleNotFoundError:
        found = None
    if not found:
        raise UserError(
            f"{ENDPOINTS[1]} is set but the exporter {EXPORTER} is not installed",
            next_step="pip install 'dverge-serve[tracing]'",
        )


def traced(app: App) -> Any:
    """Return `app` as an ASGI application with a span around each request if tracing is wanted.

    Sampler, service name, headers and all else follow the `OTEL_*` variables. Quiet routes have no
    spans: polled every few seconds, they would bury all others.
    """
    if not wanted():
        return app
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "dverge")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    paths = [route.path for route in app.routes.values() if route.quiet]
    quiet = ",".join(path.replace("{version}", "[^/]+") + "$" for path in paths)
    return OpenTelemetryMiddleware(
        app, tracer_provider=provider, excluded_urls=quiet, exclude_spans=["receive", "send"]
    )
