"""Traces reach a collector, with the caller's trace continued and the probes left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dverge_serve.errors import UserError
from dverge_serve.serving import tracing
from tests.serving import tiny
from tests.serving.server import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector() -> Iterator[tuple[str, Queue[bytes]]]:
    """A collector on a free port, and the bodies that it was sent."""
    bodies: Queue[bytes] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.put(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_spans_reach_the_collector(tmp_path: Path, collector: tuple[str, Queue[bytes]]) -> None:
    url, bodies = collector
    tiny.save_gray_model(tmp_path / "model.onnx")
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_SERVICE_NAME": "digits",
    }
    with serving(tmp_path, **settings) as server:
        answer = httpx.post(f"{server.url}/predict", content=tiny.png(255), headers=headers)
        assert answer.json()["predictions"][0]["label"] == "bright"
        request = ExportTraceServiceRequest.FromString(bodies.get(timeout=30))
    (resource,) = request.resource_spans
    names = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    assert names["service.name"] == "digits"
    (span,) = resource.scope_spans[0].spans  # none for the probes that came before
    assert span.trace_id.hex() == TRACE
    assert "/predict" in span.name


def test_a_missing_exporter_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    tracing.check()
    for missing in ("opentelemetry.exporter.otlp.nowhere", "nowhere.exporter"):
        monkeypatch.setattr(tracing, "EXPORTER", missing)
        with pytest.raises(UserError, match=r"dverge-serve\[tracing\]"):
            tracing.check()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    tracing.check()
