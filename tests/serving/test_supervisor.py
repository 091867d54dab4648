"""The supervisor: a request to end is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from bentoml._internal.utils import circus
from circus.exc import ConflictError
from circus.sighandler import SysHandler

from dverge_serve.serving import supervisor


class Busy(supervisor.Supervisor):
    """One that is starting a worker whenever it is asked, the third time excepted."""

    def __init__(self) -> None:
        self.told: list[Callable[[], Awaitable[None]]] = []
        self.loop = SimpleNamespace(add_callback_from_signal=self.told.append)
        self.asked = 0

    async def stop(self) -> None:
        """End, if nothing else is under way."""
        self.asked += 1
        if self.asked < 3:
            raise ConflictError


@pytest.mark.usefixtures("with_a_terminal")
@pytest.mark.parametrize("name", ["term", "int", "hup"])
def test_a_signal_that_comes_while_a_worker_is_started_ends_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute in ("quit", "handle_hup"):  # to be put back
        monkeypatch.setattr(SysHandler, attribute, getattr(SysHandler, attribute))
    monkeypatch.setattr(circus, "Arbiter", circus.Arbiter)
    monkeypatch.setattr(supervisor, "RETRY_S", 0.0)
    supervisor.take_over()
    busy, handler = Busy(), SysHandler.__new__(SysHandler)
    handler.controller = SimpleNamespace(arbiter=busy)
    getattr(handler, f"handle_{name}")()
    (end,) = busy.told
    asyncio.run(end())  # type: ignore[arg-type]
    assert busy.asked == 3
