"""A recorder without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from training.parallel.cuda_graphs import CudaRecorder


class Tape(CudaRecorder):
    """Records by remembering the work, and says what it was asked for."""

    def __init__(self, *, fails: str = "", error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self._fails, self._error = fails, error

    def _asked(self, what: str) -> None:
        self.asked.append(what)
        if what == self._fails and self._error is not None:
            raise self._error

    def warm(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        self._asked("warm")
        return work()

    def record(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        self._asked("record")

        def replay() -> list[Tensor]:
            self.asked.append("replay")
            return work()

        return replay
