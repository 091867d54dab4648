"""Reload without downtime: every worker takes the new model file, or none does.

The workers of a server share a folder. It holds a copy of each model file put in service (a
version), and `state.json`, which says which one is current and which one is to be next:

1. The worker that gets `POST /admin/reload` copies the model and its report, and names the copy
   as next. Every worker loads and warms it beside the old one, and leaves a note: ready, or failed.
2. If all are ready it names the copy as current, and every worker swaps; otherwise it withdraws
   the copy, and the old model stays in service.

No number is given twice, withdrawn ones included, so that a late note cannot be about another file.
A restarted worker loads the current copy, whatever is at the model's path by then; a worker that
serves another version than the current one loads the current one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from dverge_serve.engine.report import report_path
from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError
from dverge_serve.files import write_atomic
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.logs import note_failure
from dverge_serve.serving.model_copy import copy_model
from dverge_serve.serving.responses import ServiceError
from dverge_serve.serving.settings import Settings, as_variables

POLL_S = 0.1
# Loading and warming up on a GPU may take long; a worker that takes longer is stuck.
LOAD_S = 300.0
READY, FAILED, SERVING = "ready", "failed", "serving"


@dataclasses.dataclass(frozen=True)
class State:
    """The shared state of the workers of one server.

    Args:
        current: the version in service; -1 before the first.
        next: the one that is to be, while a reload is under way.
        last: the highest number that was ever given.
    """

    current: int = -1
    next: int | None = None
    last: int = -1


class ModelVersions:
    """The folder that the workers of one server share.

    Args:
        folder: made if need be.
        trust: whose signature a model must have to become a version; None if it needs none.
    """

    def __init__(self, folder: Path, trust: Trust | None = None) -> None:
        self.folder, self._trust = folder, trust
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        (folder / "notes").mkdir(exist_ok=True)

    @property
    def state(self) -> State:
        """The shared state, as last written."""
        try:
            return State(**json.loads((self.folder / "state.json").read_bytes()))
        except FileNotFoundError:
            return State()

    def write_state(self, state: State) -> None:
        """Write the shared state."""
        write_atomic(self.folder / "state.json", json.dumps(dataclasses.asdict(state)).encode())

    def begin(self, model: Path) -> None:
        """Make `model` the first version, unless there is one.

        Raises:
            UserError: it cannot be copied.
        """
        if self.state.current < 0:
            self.add(0, model)
            self.write_state(State(current=0, last=0))

    def path(self, version: int) -> Path:
        """Return the path of a version's model file; its report is in the same folder."""
        return self.folder / f"{version}.onnx"

    def add(self, version: int, model: Path) -> None:
        """Copy `model` and its report as a version, and drop those but the current one.

        Raises:
            UserError: it cannot be read or written, or is not signed by whom it must be.
        """
        copy_model(model, self.path(version), self._trust)
        # The one before it goes with the next reload: a worker that starts may be about to read it.
        kept = {self.path(each) for each in (version, self.state.current)}
        for old in set(self.folder.glob("*.onnx")) - kept:
            old.unlink()
            report_path(old).unlink(missing_ok=True)
        for note in (self.folder / "notes").iterdir():
            if f"-{SERVING}-" not in note.name:
                note.unlink()

    def register(self) -> None:
        """Record that this process is one of the workers."""
        (self.folder / "workers" / str(os.getpid())).touch()

    def workers(self) -> list[int]:
        """Return the process ids of the running workers."""
        found = [int(file.name) for file in (self.folder / "workers").iterdir()]
        return [pid for pid in found if _lives(pid)]

    def note(self, version: int, kind: str, text: str = "") -> None:
        """Leave a note of this worker about a version."""
        write_atomic(self.folder / "notes" / f"{version}-{kind}-{os.getpid()}", text.encode())

    def read_note(self, version: int, kind: str, pid: int) -> str | None:
        """Return a worker's note, None if it has left none."""
        try:
            return (self.folder / "notes" / f"{version}-{kind}-{pid}").read_text()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock that lets one worker at a time reload.

        Raises:
            ServiceError: another one has it.
        """
        try:
            # The system releases it when its holder dies.
            lock = FileLock(self.folder / "lock").acquire(blocking=False)
        except Timeout as error:
            raise ServiceError("reload_refused", "another reload is under way") from error
        with lock:
            yield


class Reloader:
    """One worker's part in reloads.

    Args:
        versions: the shared folder.
        settings: how the service runs; `model` is the file that a reload looks at.
        worker: this worker's number, from 1.
        swap: puts a loaded model in service.
    """

    def __init__(
        self,
        versions: ModelVersions,
        settings: Settings,
        worker: int,
        swap: Callable[[ServedModel], None],
    ) -> None:
        self._versions, self._settings = versions, settings
        self._worker, self._swap = worker, swap
        self._mine = -1
        self._prepared: tuple[int, ServedModel] | None = None
        self._given_up: int | None = None

    def load_current(self) -> ServedModel:
        """Load the current version; blocks.

        Raises:
            UserError: it cannot be served.
        """
        self._versions.register()
        self._versions.begin(self._settings.model)
        self._mine = self._versions.state.current
        return self._load(self._mine)

    def announce(self, served: ServedModel) -> None:
        """Leave a note that this worker serves the version it loaded."""
        self._versions.note(self._mine, SERVING, served.sha256)

    @property
    def any_served(self) -> bool:
        """Whether any worker has ever left such a note."""
        return any((self._versions.folder / "notes").glob(f"*-{SERVING}-*"))

    @property
    def all_served(self) -> bool:
        """Whether every running worker has left such a note."""
        notes = self._versions.folder / "notes"
        return all(any(notes.glob(f"*-{SERVING}-{pid}")) for pid in self._versions.workers())

    async def watch(self) -> None:
        """Follow the shared state until cancelled."""
        while True:
            try:
                await self._follow()
            except Exception as error:  # the watch must survive any failure of the folder
                note_failure("following a reload failed", error)
            await asyncio.sleep(POLL_S)

    async def reload(self) -> dict[str, Any]:
        """Put the file now at the model's path in service, in every worker.

        Returns:
            version, number of workers.

        Raises:
            ServiceError: the file cannot be served, or not by every worker; the old one goes on.
        """
        versions = self._versions
        with versions.exclusive():
            state = versions.state
            following = state.last + 1
            try:
                await asyncio.to_thread(versions.add, following, self._settings.model)
            except UserError as error:
                raise ServiceError("reload_refused", as_variables(error)) from error
            versions.write_state(State(state.current, following, following))
            try:
                await self._all(following, READY)
            except BaseException:
                versions.write_state(State(state.current, None, following))
                raise
            versions.write_state(State(following, None, following))
            workers = await self._all(following, SERVING)
        return {"generation": following, "workers": workers}

    async def _all(self, version: int, kind: str) -> int:
        """Wait until every running worker has left this note; return their number."""
        try:
            async with asyncio.timeout(LOAD_S):
                while True:
                    workers = self._versions.workers()
                    for pid in workers:
                        reason = self._versions.read_note(version, FAILED, pid)
                        if reason is not None:
                            raise ServiceError("reload_refused", reason)
                    if all(self._versions.read_note(version, kind, pid) for pid in workers):
                        return len(workers)
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            text = f"not every worker was {kind} within {LOAD_S:g} s"
            raise ServiceError("reload_refused", text) from error

    async def _follow(self) -> None:
        state = self._versions.state
        if state.current < 0:  # the folder is gone: the server ends
            return
        if self._prepared and self._prepared[0] == state.current:
            self._mine, served = self._prepared
            self._prepared = None
            self._swap(served)
            self._versions.note(self._mine, SERVING, served.sha256)
        elif state.current not in (self._mine, self._given_up):  # it started in between
            await self._prepare(state.current)
        elif state.next is None:
            self._prepared = None
        elif state.next not in (self._given_up, self._prepared and self._prepared[0]):
            await self._prepare(state.next)

    async def _prepare(self, version: int) -> None:
        try:
            served = await asyncio.to_thread(self._load, version)
        except Exception as error:  # whatever it is, it must reach the caller of the reload
            self._given_up = version
            copy, model = self._versions.path(version), self._settings.model
            reason = str(error).replace(str(copy), str(model))
            reason = reason.replace(str(report_path(copy)), str(report_path(model)))
            self._versions.note(version, FAILED, reason or type(error).__name__)
            return
        self._prepared = (version, served)
        self._versions.note(version, READY, served.sha256)

    def _load(self, version: int) -> ServedModel:
        path = self._versions.path(version)
        return ServedModel(dataclasses.replace(self._settings, model=path), self._worker)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
