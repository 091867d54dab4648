"""The route table of a service: every path, its handler, who may call it, and what it answers."""

from __future__ import annotations

import asyncio
from functools import partial

from dverge_serve.serving import openapi
from dverge_serve.serving.classify import Classifier
from dverge_serve.serving.decoding import MOST_PIXELS
from dverge_serve.serving.metrics import CONTENT_TYPE
from dverge_serve.serving.oip import BASE, VERSIONED, InferenceProtocol
from dverge_serve.serving.pages import demo_page, start_page
from dverge_serve.serving.predict import Predict, model_card
from dverge_serve.serving.requests import Request
from dverge_serve.serving.responses import TEXT, Response, ServiceError, json_response
from dverge_serve.serving.routes import Route
from dverge_serve.serving.settings import Exposure, Settings
from dverge_serve.serving.worker import Worker

CLASSIFY_ERRORS = (400, 408, 413, 415, 429, 500, 503, 504)


class RouteTable(dict[str, Route]):
    """The routes of one service by their paths.

    Args:
        worker: what is in service.
        classifier: the model in service, behind the limits.
    """

    def __init__(self, worker: Worker, classifier: Classifier) -> None:
        settings, expose = classifier.settings, classifier.expose
        v2 = InferenceProtocol(classifier, worker.check_ready)
        own = _Handlers(worker, expose)
        get, post = partial(Route, "GET"), partial(Route, "POST")
        probe = partial(get, public=True, quiet=True)
        report = "The robustness report of this very model file"
        examples = "Attacked test images that the report keeps, PNG in base64"
        metrics = "Prometheus metrics, over all workers"
        server = "The server, in the Open Inference Protocol V2"
        loaded, runs = "Whether the model is loaded and warm", "Whether the process runs"
        routes = [
            post(
                "/predict",
                Predict(classifier),
                "Classify images",
                openapi.predictions(expose),
                CLASSIFY_ERRORS,
                openapi.images(settings),
                f"A body of at most {settings.max_body_bytes} bytes; images of at most "
                f"{settings.max_pixels} pixels, at most {settings.max_images} in multipart and "
                f"{max(MOST_PIXELS, settings.max_pixels)} pixels together. "
                "EXIF orientation is applied, alpha composited on white; animations are refused.",
            ),
            get("/model", own.model, "The model's card", openapi.ref("Card"), (503,)),
            get("/report", own.report, report, openapi.OBJECT, (404, 503)),
            get("/examples", own.examples, examples, openapi.OBJECT, (404, 503)),
            get("/metrics", own.metrics, metrics, openapi.TEXT, admin=True, quiet=True),
            probe("/livez", own.livez, runs, openapi.TEXT),
            probe("/readyz", own.readyz, loaded, openapi.TEXT, (503,)),
            get("/openapi.json", own.describe, "This document", openapi.OBJECT, public=True),
            get("/docs.json", own.describe, "This document", openapi.OBJECT, public=True),
            get("/v2", v2.server, server, openapi.OBJECT),
            probe("/v2/health/live", v2.live, runs, openapi.OBJECT),
            probe("/v2/health/ready", v2.ready, loaded, openapi.OBJECT, (503,)),
            *_model_routes(BASE, v2, settings),
            *_model_routes(VERSIONED, v2, settings),
            get("/", own.start, "The start page", openapi.HTML, public=True),
            get("/demo", own.demo, "A page to try images on", openapi.HTML, public=True),
        ]
        if settings.token or settings.admin_token:
            reload = "Put the model file now in place in service"
            routes.append(
                post("/admin/reload", own.reload, reload, openapi.OBJECT, (409, 503), admin=True)
            )
        super().__init__({route.path: route for route in routes})
        self.document = openapi.document(routes, settings, expose)
        own.document = json_response(self.document)

    def find(self, path: str) -> Route | None:
        """Return the route of a path; any version in it will do: the handler checks it."""
        if path.startswith(f"{BASE}/versions/"):
            _, slash, rest = path.removeprefix(f"{BASE}/versions/").partition("/")
            path = VERSIONED + slash + rest
        return self.get(path)


def _model_routes(base: str, v2: InferenceProtocol, settings: Settings) -> list[Route]:
    """Return what V2 has for a model, or for one version of it."""
    versioned = (404,) if base == VERSIONED else ()
    document = openapi.OBJECT
    return [
        Route(
            "GET", base, v2.metadata, "The model's inputs and outputs", document, (*versioned, 503)
        ),
        Route(
            "GET",
            f"{base}/ready",
            v2.ready,
            "Whether it is loaded",
            document,
            (*versioned, 503),
            quiet=True,
        ),
        Route(
            "POST",
            f"{base}/infer",
            v2.infer,
            "Classify tensors",
            openapi.ref("Inference") | openapi.BINARY,
            (*versioned, *CLASSIFY_ERRORS),
            openapi.tensors(),
            "One input 'images', FP32 of exactly the model's shape, numbers in [0, 1], at most "
            f"{settings.max_images} images. With the header Inference-Header-Content-Length "
            "the JSON takes that many bytes and binary tensors follow it. The body may be "
            f"compressed (gzip, deflate) if it unpacks to at most {settings.max_body_bytes} bytes.",
        ),
    ]


class _Handlers:
    """The handlers of the routes that do not classify."""

    document: Response

    def __init__(self, worker: Worker, expose: Exposure) -> None:
        self._worker, self._expose = worker, expose

    async def livez(self, _: Request) -> Response:
        return Response(200, b"alive\n", TEXT)

    async def readyz(self, _: Request) -> Response:
        self._worker.check_ready()
        return Response(200, b"ready\n", TEXT)

    async def metrics(self, _: Request) -> Response:
        body = await asyncio.get_running_loop().run_in_executor(None, self._worker.metrics.render)
        return Response(200, body, CONTENT_TYPE)

    async def describe(self, _: Request) -> Response:
        return self.document

    async def model(self, _: Request) -> Response:
        return json_response(model_card(self._worker.model(), self._expose))

    async def report(self, _: Request) -> Response:
        served = self._worker.model()
        if self._expose == "label":
            raise ServiceError("not_exposed", "this service shows labels alone")
        report = served.report
        if report.value is None:
            raise ServiceError("no_report", f"beside this model lies {report.told}")
        if self._expose == "full":
            return json_response(report.value)
        return json_response({"model": {"sha256": served.sha256}, **(report.headline or {})})

    async def examples(self, _: Request) -> Response:
        if self._expose != "full":
            raise ServiceError("not_exposed", "this service does not show its report's images")
        report = self._worker.model().report
        found = (report.value or {}).get("examples")
        if not found:
            why = report.told if report.value is None else "a report that keeps none"
            raise ServiceError("no_examples", f"beside this model lies {why}")
        return json_response(found)

    async def reload(self, _: Request) -> Response:
        return json_response(await self._worker.reload())

    async def start(self, request: Request) -> Response:
        # The page takes no token: of a protected service it must not show the model.
        served = None if self._worker.settings.token else self._worker.served
        host = request.headers.get(b"host", b"").decode("latin-1")
        return start_page(served, self._expose, host)

    async def demo(self, _: Request) -> Response:
        return demo_page()
