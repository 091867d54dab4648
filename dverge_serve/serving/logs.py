"""Log lines of the service: one a request and one an event, as text or as JSON."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import sys
import time
import warnings
from typing import Any, TextIO

from dverge_serve.serving.settings import Log

LOGGER = logging.getLogger("dverge")
# Lines of requests are gathered this long and written together; a write each costs as much as
# the rest of the answer.
GATHER_S = 0.2
MOST_LINES = 1000
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# After a failure, seconds in which the same one is not logged again.
QUIET_S = 10.0
_quiet_until: dict[str, float] = {}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": _stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """Time, level and message; control characters escaped, so that a line stays a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback under it if there is one."""
        message = record.getMessage().encode("unicode_escape").decode()
        line = f"{_stamp(record.created)} {record.levelname.lower()} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(form: Log) -> None:
    """Send our lines and warnings to standard output in `form`; in JSON, the libraries' too."""
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
    if form == "json":
        loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
        for logger in (logging.root, *loggers):
            for other in logger.handlers:
                other.setFormatter(formatter)


def note_failure(what: str, error: BaseException | None) -> None:
    """Log what failed in no request, once in a while as long as it goes on failing.

    Args:
        what: in the same words each time.
        error: of a shortage its text is enough; of anything else the traceback is logged.
    """
    now = time.monotonic()
    if now < _quiet_until.get(what, 0.0):
        return
    _quiet_until[what] = now + QUIET_S
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        LOGGER.error("%s: %s", what, error.strerror)
    else:
        LOGGER.error("%s", what, exc_info=error)


class RequestLog:
    """The line that each answered request leaves.

    Args:
        form: text or JSON.
        stream: where the lines go; standard output unless told otherwise.
    """

    def __init__(self, form: Log, stream: TextIO | None = None) -> None:
        self._form, self._stream = form, stream or sys.stdout
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self, request_id: str, method: str, route: str, status: str, seconds: float) -> None:
        """Log one request. Every field is ours, so that no caller can forge a line."""
        stamp, millis = _stamp(time.time()), f"{seconds * 1000:.1f}"
        if self._form == "json":
            line = (
                f'{{"time": "{stamp}", "level": "info", "message": "request", '
                f'"request_id": "{request_id}", "method": "{method}", "route": "{route}", '
                f'"status": "{status}", "ms": {millis}}}\n'
            )
        else:
            line = f"{stamp} info {method} {route} {status} {millis} ms {request_id}\n"
        self._lines.append(line)
        if len(self._lines) >= MOST_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            text, self._lines = "".join(self._lines), []
            self._stream.write(text)
            self._stream.flush()


def _stamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
