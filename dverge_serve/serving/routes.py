"""A route: one path of the service, its handler, and its description for OpenAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from dverge_serve.serving.requests import Request
from dverge_serve.serving.responses import Response
from dverge_serve.serving.settings import Settings

Handler = Callable[[Request], Awaitable[Response]]
Lock = Literal["token", "admin_token"]


@dataclass(frozen=True, slots=True)
class Route:
    """One path of the service.

    Args:
        method: `GET`, which answers HEAD too, or `POST`.
        path: without parameters.
        handler: answers a request, or raises a `ServiceError`.
        summary: what it does, for the OpenAPI description, as are all that follow but the flags.
        content: media types and schemas of a successful answer.
        errors: HTTP statuses of the errors it may answer with, beside a missing token's.
        body: media types and schemas of the request's body.
        description: what the summary leaves out.
        public: no token is asked for.
        admin: for the operator alone, where there is a token for that.
        quiet: machines poll it: no log line and no trace for a call.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    content: dict[str, Any]
    errors: tuple[int, ...] = ()
    body: dict[str, Any] | None = None
    description: str = ""
    public: bool = False
    admin: bool = False
    quiet: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it takes."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)

    def lock(self, settings: Settings) -> Lock | None:
        """Return the setting that holds the token for this route; None where it takes none."""
        if self.admin and settings.admin_token:
            return "admin_token"
        return "token" if settings.token and not self.public else None
