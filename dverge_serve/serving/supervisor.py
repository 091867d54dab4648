"""The process that keeps the workers running: BentoML's, quicker to notice and quicker to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from bentoml._internal.utils import circus
from circus.exc import ConflictError

# Circus does one thing at a time, and refuses what is asked meanwhile; then we ask again.
RETRY_S = 0.2


class Supervisor(circus.Arbiter):  # type: ignore[misc]
    """Starts a new worker as soon as one has died, where Circus looks every ten seconds."""

    def start(self, cb: Callable[[Any], Any] | None = None) -> None:
        """Run until told to end."""
        signal.signal(signal.SIGCHLD, self._on_child)
        super().start(cb)

    def end(self) -> None:
        """End, from a signal handler: also while a worker is being started."""
        self.loop.add_callback_from_signal(self._end)

    async def _end(self) -> None:
        while True:  # until the loop stops
            try:
                await self.stop()
                return
            except ConflictError:
                await asyncio.sleep(RETRY_S)

    def _on_child(self, *_: object) -> None:
        self.loop.add_callback_from_signal(self._manage)

    async def _manage(self) -> None:
        for _ in range(round(10 / RETRY_S)):  # after that Circus looks by itself
            try:
                await self.manage_watchers()
                return
            except ConflictError:
                await asyncio.sleep(RETRY_S)


def take_over() -> None:
    """Let BentoML use this supervisor, and let it end when it is told to.

    Circus would forget a signal that comes while it starts a worker. Where the terminal is closed,
    it would start new workers and stay; `nohup` still keeps the server running.
    """
    from circus.sighandler import SysHandler

    circus.Arbiter = Supervisor
    SysHandler.quit = lambda handler: handler.controller.arbiter.end()
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    SysHandler.handle_hup = SysHandler.handle_winch if ignored else SysHandler.handle_term
