"""HTTP/1.1 on a connection: uvicorn's protocol, where callers cannot turn it against the service.

- `Upgrade` is ignored, as RFC 9110, section 7.8, allows. The parser would take what follows the
  headers for another protocol, skip the body, and read it as a request of its own.
- Headers, trailers and the framing of chunks are bounded; trailers are dropped.
- A caller that has closed its sending side still gets its answer.
- Headers and body of an answer leave together.
"""

from __future__ import annotations

import asyncio
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dverge_serve.serving.joined_writes import JoinedWrites

# Bytes of a message that are not its body: headers, sizes of chunks, trailers. More are taken only
# along with a body of that length.
MOST_FRAMING = 65_536
# Seconds for the headers to arrive once they have begun.
HEADERS_S = 10.0
# Requests sent ahead on one connection.
MOST_AHEAD = 64
# Seconds for the answer to a caller that sends no more; it may have left, which looks the same.
HALF_CLOSED_S = 5.0
# Headers that say how long a body is: what a parser must know to read one.
LENGTHS = (b"content-length", b"transfer-encoding")


class Protocol(HttpToolsProtocol):
    """One connection."""

    _in_headers = False
    _replaying = False
    _framing = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        self._writes = JoinedWrites(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._writes))

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        self._unset_keepalive_if_required()
        self._framing += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
            return
        if self._framing > MOST_FRAMING:
            self._refuse("Too many bytes beside the body.")
        elif self._in_headers and self._timer is None:
            self._timer = self.loop.call_later(
                HEADERS_S, self._refuse, "The headers came too slowly."
            )

    def on_response_complete(self) -> None:
        """Send the answer; what the application does after it need not be waited for."""
        self._writes.flush()
        super().on_response_complete()

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._replaying:
            self._in_headers = True
            self._framing = 0
            super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request over; trailers, which come after that, are kept apart and dropped."""
        if not self._replaying:
            self._in_headers = False
            self._stop_timer()
            if len(self.pipeline) > MOST_AHEAD:
                raise httptools.HttpParserError("too many requests ahead")
            super().on_headers_complete()
            self.headers = []

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._framing -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body, unless it is about to be read by another parser."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for a while if an answer is still to be sent."""
        self._writes.flush()
        if not self._is_answering or self.scheme == "https":  # TLS has no half-closed connections
            return False
        self.cycle.keep_alive = False
        self._stop_timer()
        self._timer = self.loop.call_later(HALF_CLOSED_S, self.transport.close)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        return False

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                self._read_on()
                data = data[upgrade.args[0] :]  # what follows the headers

    def _read_on(self) -> None:
        """Go on with a parser to which this request asked for no upgrade."""
        lines = [name + b": " + value for name, value in self.scope["headers"] if name in LENGTHS]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._replaying = True
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *lines, b"", b""]))
        self._replaying = False

    def _refuse(self, why: str) -> None:
        """End the connection, once the requests before this one have their answers."""
        self._stop_timer()
        self.logger.warning(why)
        begun = self.cycle is not None and self.cycle.response_started and not self._in_headers
        if self._is_answering:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        elif begun or self.pipeline:
            self.transport.close()
        else:
            self.send_400_response(why)

    @property
    def _is_answering(self) -> bool:
        """Whether a request has come as a whole and its answer has not yet been sent."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
