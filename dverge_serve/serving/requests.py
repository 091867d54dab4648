"""HTTP requests: headers, bodies within the limits, and disconnects of callers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from dverge_serve.serving.responses import Headers, ServiceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

# A request that is answered sooner is not worth a task that watches for its caller's leaving.
PATIENCE_S = 0.1
# A body may fall this far behind the least rate, in bytes a second, before it is given up.
GRACE_S, LEAST_RATE = 10.0, 8192
# An unread body up to this size is left to the server to discard, keeping the connection.
SMALL_BODY = 65_536


class ClientDisconnect(Exception):  # noqa: N818 - as Starlette's ClientDisconnect
    """The caller closed the connection before the response."""


class BodyBudget:
    """A bound on the bytes of request bodies held at one moment, over all connections.

    Where it is reached, the body that came slowest makes room for the others, among those that hold
    at least their share: slow senders cannot lock out quick ones, nor large bodies small ones.

    Args:
        limit: most bytes held at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.arriving: set[Request] = set()

    def take(self, count: int, request: Request) -> None:
        """Count `count` bytes as held by `request`; fewer than 0 are given back.

        Raises:
            ServiceError: that would be more than the limit, and no other body gives way.
        """
        while count > 0 and self.held + count > self.limit:
            share = sum(each.taken for each in self.arriving) / max(1, len(self.arriving))
            large = [each for each in self.arriving if each.taken >= share]
            slowest = min(large, key=lambda each: each.credit, default=request)
            if slowest is request:
                raise _crowded()
            self.release(slowest)
            slowest.give_way()
        self.held += count
        request.taken += count

    def release(self, request: Request) -> None:
        """Give back all that `request` holds."""
        self.held -= request.taken
        request.taken = 0
        self.arriving.discard(request)


class Request:
    """A request as the ASGI server hands it over."""

    __slots__ = (
        *("_deadline", "_gave_way", "_receive", "_scope", "body_read", "credit"),
        *("headers", "id", "method", "path", "taken", "told"),
    )

    def __init__(self, scope: Scope, receive: Receive, request_id: str) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = request_id
        self.body_read = False
        self.told: Headers = ()  # headers of its answer, whatever that is
        self.taken = 0  # bytes of the budget this request holds
        self.credit = 0.0  # when the body will have come too slowly, on the loop's clock
        self._deadline: asyncio.Timeout | None = None
        self._gave_way = False
        self._receive, self._scope = receive, scope

    def check(self) -> None:
        """Check the headers that say where a request belongs and where its body ends.

        Proxies and servers that disagree about these see different requests.

        Raises:
            ServiceError: no or several hosts, or a transfer coding other than chunked.
        """
        raw, coding = self._scope["headers"], b"transfer-encoding"
        if len(raw) == len(self.headers) and b"host" in self.headers and coding not in self.headers:
            return
        names = [name for name, _ in raw]
        close = ((b"connection", b"close"),)
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and self._scope["http_version"] != "1.0"):
            raise ServiceError("bad_request", f"{hosts} host headers; expected one", close)
        if names.count(coding) > 1 or self.headers.get(coding, b"chunked").lower() != b"chunked":
            raise ServiceError("bad_request", "transfer-encoding is not 'chunked' alone", close)

    @property
    def content_type(self) -> str:
        """The media type without parameters, in lower case; empty if none was sent."""
        value = self.headers.get(b"content-type", b"")
        return value.partition(b";")[0].strip().lower().decode("latin-1")

    @property
    def content_coding(self) -> bytes:
        """How the body is compressed, in lower case; `identity` if it is not."""
        return self.headers.get(b"content-encoding", b"identity").strip().lower()

    @property
    def has_large_unread_body(self) -> bool:
        """Whether a large part of the body is still unread."""
        if self.body_read:
            return False
        if b"transfer-encoding" in self.headers:
            return True
        value = self.headers.get(b"content-length", b"0")
        return not (value.isdigit() and len(value) < 6 and int(value) <= SMALL_BODY)

    @contextlib.contextmanager
    def holding(self, budget: BodyBudget) -> Iterator[None]:
        """Release the bytes of this request's body at the end."""
        try:
            yield
        finally:
            budget.release(self)

    def give_way(self) -> None:
        """Stop reading the body: others need the room."""
        self._gave_way = True
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def body(self, limit: int, timeout_s: float, budget: BodyBudget) -> bytes:
        """Read the body; call inside `holding`.

        Args:
            limit: most bytes; a longer body is refused before it is read whole.
            timeout_s: seconds for all of it to arrive.
            budget: where the bytes held are counted.

        Raises:
            ServiceError: too long (413), too slow (408), or too many bodies at once (503).
            ClientDisconnect: the caller hung up.
        """
        if _length(self.headers.get(b"content-length", b"0")) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        clock = asyncio.get_running_loop().time
        end = clock() + timeout_s
        self.credit = clock() + GRACE_S
        budget.arriving.add(self)
        try:
            async with asyncio.timeout_at(min(end, self.credit)) as self._deadline:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    if self._gave_way:
                        raise _crowded()
                    chunk = message.get("body", b"")
                    if self.taken + len(chunk) > limit:
                        raise _too_large(limit)
                    budget.take(len(chunk), self)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
                    self.credit = min(self.credit + len(chunk) / LEAST_RATE, clock() + GRACE_S)
                    self._deadline.reschedule(min(end, self.credit))
        except TimeoutError as error:
            if self._gave_way:
                raise _crowded() from error
            late = clock() >= end
            told = f"within {timeout_s:g} s" if late else f"at {LEAST_RATE} bytes a second"
            close = ((b"connection", b"close"),)
            raise ServiceError("body_timeout", f"the body did not arrive {told}", close) from error
        finally:
            budget.arriving.discard(self)
            self._deadline = None
        self.body_read = True
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def wait_for(self, future: asyncio.Future[T]) -> T:
        """Await `future`, and cancel it if the caller hangs up meanwhile. Call after `body`.

        Raises:
            ClientDisconnect: the caller hung up.
        """
        loop = asyncio.get_running_loop()
        watcher: asyncio.Task[bool] | None = None

        async def watch() -> bool:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            return future.cancel()

        def begin() -> None:
            nonlocal watcher
            watcher = loop.create_task(watch())

        timer = loop.call_later(PATIENCE_S, begin)
        try:
            return await future
        except asyncio.CancelledError:
            if watcher is not None and watcher.done():
                raise ClientDisconnect from None
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    async def discard(self, limit: int, timeout_s: float) -> None:
        """Read and drop the rest of the body, within limits.

        Closing a connection with unread bytes in it resets it, and the caller would lose the
        answer that was just sent.
        """
        seen = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while seen < limit:
                    message = await self._receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    seen += len(message.get("body", b""))


def _length(value: bytes) -> int:
    # isdigit() because int() also takes signs, spaces and underscores.
    if not value.isdigit() or len(value) > 18:
        raise ServiceError("bad_request", "the content-length header is not a number")
    return int(value)


def _crowded() -> ServiceError:
    return ServiceError("queue_full", "too many request bodies are being read; retry later")


def _too_large(limit: int) -> ServiceError:
    return ServiceError("body_too_large", f"the body is too large; expected at most {limit} bytes")
