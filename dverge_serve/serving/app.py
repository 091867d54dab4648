"""The HTTP application: what all routes share.

Plain ASGI: all paths are fixed, so that a dictionary is the whole router, and a request meets
nothing on its way that it does not need.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from itertools import count

from dverge_serve.cores import cores
from dverge_serve.serving.classify import Classifier
from dverge_serve.serving.decoding import Decoder
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.logs import LOGGER, RequestLog
from dverge_serve.serving.requests import (
    BodyBudget,
    ClientDisconnect,
    Receive,
    Request,
    Scope,
    Send,
)
from dverge_serve.serving.responses import Response, ServiceError
from dverge_serve.serving.route_table import RouteTable
from dverge_serve.serving.routes import Route
from dverge_serve.serving.settings import Exposure
from dverge_serve.serving.watch import Watch
from dverge_serve.serving.worker import Worker

REQUEST_ID = re.compile(rb"[A-Za-z0-9-]{1,64}")
# Bodies held at one moment, in units of the largest one.
BUDGET_BODIES = 16
LINGER_BYTES, LINGER_S = 64 * 1024 * 1024, 5.0
METHOD = re.compile("[A-Z]{1,16}")


class App:
    """The service as an ASGI application.

    Args:
        worker: what is in service, and how.
        expose: how much callers see, once it is known where the service listens.
    """

    def __init__(self, worker: Worker, *, expose: Exposure) -> None:
        settings = worker.settings
        self.worker = worker
        self.metrics = worker.metrics
        self.decoder = Decoder(settings.max_pixels, max(1, cores() // settings.workers))
        self._log = RequestLog(settings.log)
        self._id_prefix = secrets.token_hex(6)
        self._ids = count(1)
        budget = BodyBudget(BUDGET_BODIES * settings.max_body_bytes)
        watch = None
        if settings.watch != "off":
            watch = Watch(settings, worker.metrics, tell=expose == "full")
        classifier = Classifier(settings, expose, self.decoder, budget, watch, worker.model)
        self.routes = RouteTable(worker, classifier)
        locks = {path: route.lock(settings) for path, route in self.routes.items()}
        # Unknown paths, too: without the token nobody learns which there are.
        self._tokens: dict[str | None, bytes] = {None: settings.token.encode()} | {
            path: getattr(settings, lock).encode() for path, lock in locks.items() if lock
        }

    async def start(self) -> None:
        """Begin to load the model; until it is there, `/readyz` answers 503."""
        await self.worker.start()

    async def stop(self) -> None:
        """Finish queued work and release everything."""
        await self.worker.stop()
        self.decoder.close()
        self._log.flush()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; other protocols are turned away."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        begun = time.perf_counter()
        request = Request(scope, receive, self._request_id(scope))
        route = self.routes.find(request.path)
        name = route.path if route else "other"
        served = self.worker.served  # the one that answers, should a reload come in between
        try:
            response = await self._respond(request, route)
            status = str(response.status)
            await self._send(request, response, served, send)
        except ClientDisconnect:
            status = "gone"
        seconds = time.perf_counter() - begun
        self.metrics.request(name, request.method, status, seconds)
        if route is None or not route.quiet:
            method = request.method if METHOD.fullmatch(request.method) else "other"
            self._log.note(request.id, method, name, status, seconds)

    async def _respond(self, request: Request, route: Route | None) -> Response:
        try:
            request.check()
            # The token comes first: without it paths and methods are not revealed.
            if token := self._tokens.get(route.path if route else None):
                _authorize(request, token)
            if route is None:
                raise ServiceError("not_found", "no such path; /openapi.json lists them all")
            if request.method not in route.methods:
                allow = ", ".join(route.methods)
                told, header = f"{route.path} takes {allow}", (b"allow", allow.encode())
                raise ServiceError("method_not_allowed", told, (header,))
            return await route.handler(request)
        except ServiceError as error:
            self.metrics.refusal(error.code)
            return error.response(v2=_is_v2(request.path))
        except ClientDisconnect:
            raise
        except Exception:
            LOGGER.exception("request %s failed", request.id)
            self.metrics.refusal("internal_error")
            told = f"a bug of ours; request {request.id} is in the log"
            return ServiceError("internal_error", told).response(v2=_is_v2(request.path))

    async def _send(
        self, request: Request, response: Response, served: ServedModel | None, send: Send
    ) -> None:
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", b"%d" % len(response.body)),
            (b"x-request-id", request.id.encode()),
            (b"x-content-type-options", b"nosniff"),
            *response.headers,
            *request.told,
        ]
        if served is not None:
            headers.append((b"x-model-sha256", served.sha256.encode()))
        linger = request.has_large_unread_body
        if linger:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        body = b"" if request.method == "HEAD" else response.body
        if not linger:
            await send({"type": "http.response.body", "body": body})
            return
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await request.discard(LINGER_BYTES, LINGER_S)
        await send({"type": "http.response.body", "body": b""})

    def _request_id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return str(value, "ascii")
        return f"{self._id_prefix}-{next(self._ids):x}"


def _authorize(request: Request, token: bytes) -> None:
    scheme, _, shown = request.headers.get(b"authorization", b"").partition(b" ")
    # Takes equally long for any content, so that the time reveals nothing of the token.
    if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), token):
        told, header = "a valid bearer token is needed", (b"www-authenticate", b"Bearer")
        raise ServiceError("unauthorized", told, (header,))


def _is_v2(path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")
