"""Reload without downtime: every worker takes the new model file, or none does.

The workers of a server share a folder. It holds a copy of each model file put in service (a
generation), and `state.json`, which says which one is current and which one is to be next:

1. The worker that gets `POST /admin/reload` copies the model and its report, and names the copy
   as next. Every worker loads and warms it beside the old one, and leaves a note: ready, or failed.
2. If all are ready it names the copy as current, and every worker swaps; otherwise it withdraws
   it, and nobody has noticed anything.

A worker that is started anew loads the current copy, whatever lies at the model's path by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from dverge_serve.answer import Refusal
from dverge_serve.errors import UserError
from dverge_serve.files import write_atomic
from dverge_serve.logs import LOGGER
from dverge_serve.report import report_path
from dverge_serve.served import ServedModel
from dverge_serve.settings import Settings

POLL_S = 0.1
# Loading and warming up on a GPU may take long; a worker that takes longer is stuck.
LOAD_S = 300.0
READY, FAILED, SERVING = "ready", "failed", "serving"


class Generations:
    """The folder that the workers of one server share.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        (folder / "notes").mkdir(exist_ok=True)

    @property
    def state(self) -> tuple[int, int | None]:
        """The current generation, and the one that is to be next, if any; -1 before the first."""
        try:
            value = json.loads((self.folder / "state.json").read_bytes())
        except FileNotFoundError:
            return -1, None
        return int(value["current"]), value["next"]

    def write_state(self, current: int, following: int | None) -> None:
        """Say which generation is current, and which one is to be next."""
        data = json.dumps({"current": current, "next": following}).encode()
        write_atomic(self.folder / "state.json", data)

    def path(self, generation: int) -> Path:
        """Return where a generation's model file lies; its report lies beside it."""
        return self.folder / f"{generation}.onnx"

    def add(self, generation: int, model: Path) -> None:
        """Copy `model` and its report as a generation, and drop those nobody can need.

        Raises:
            UserError: it cannot be read or written.
        """
        try:
            shutil.copyfile(model, self.path(generation))
            report = report_path(self.path(generation))
            report.unlink(missing_ok=True)
            if report_path(model).is_file():
                shutil.copyfile(report_path(model), report)
        except OSError as error:
            raise UserError(f"cannot copy {model} ({error.strerror or error})") from error
        # The last one stays: a worker that is just starting may be about to read it.
        for old in range(generation - 2, -1, -1):
            if not self.path(old).exists():
                break
            self.path(old).unlink()
            report_path(self.path(old)).unlink(missing_ok=True)

    def register(self) -> None:
        """Say that this process is one of the workers."""
        (self.folder / "workers" / str(os.getpid())).touch()

    def workers(self) -> list[int]:
        """Return the process ids of the workers that live."""
        found = [int(file.name) for file in (self.folder / "workers").iterdir()]
        return [pid for pid in found if _lives(pid)]

    def note(self, generation: int, kind: str, text: str = "") -> None:
        """Leave a note of this worker about a generation."""
        write_atomic(self.folder / "notes" / f"{generation}-{kind}-{os.getpid()}", text.encode())

    def read_note(self, generation: int, kind: str, pid: int) -> str | None:
        """Return a worker's note, None if it has left none."""
        try:
            return (self.folder / "notes" / f"{generation}-{kind}-{pid}").read_text()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the right to reload, which one worker at a time has.

        Raises:
            Refusal: another one has it.
        """
        lock = self.folder / "lock"
        with contextlib.suppress(OSError, ValueError):
            if not _lives(int(lock.read_text())):
                lock.unlink()
        try:
            with lock.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError as error:
            raise Refusal("reload_refused", "another reload is under way") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class Reloader:
    """One worker's part in reloads.

    Args:
        generations: the shared folder.
        settings: how the service runs; `model` is the file that a reload looks at.
        worker: this worker's number, from 1.
        swap: puts a loaded model in service.
    """

    def __init__(
        self,
        generations: Generations,
        settings: Settings,
        worker: int,
        swap: Callable[[ServedModel], None],
    ) -> None:
        self._generations, self._settings = generations, settings
        self._worker, self._swap = worker, swap
        self._mine = -1
        self._prepared: tuple[int, ServedModel] | None = None
        self._given_up: int | None = None

    def load_current(self) -> ServedModel:
        """Load the current generation; blocks.

        Raises:
            UserError: it cannot be served.
        """
        self._generations.register()
        current, _ = self._generations.state
        if current < 0:
            self._generations.add(0, self._settings.model)
            self._generations.write_state(0, None)
            current = 0
        self._mine = current
        return self._load(current)

    def announce(self, served: ServedModel) -> None:
        """Leave a note that this worker serves the generation it loaded."""
        self._generations.note(self._mine, SERVING, served.sha256)

    @property
    def any_served(self) -> bool:
        """Whether any worker has ever left such a note."""
        return any((self._generations.folder / "notes").glob(f"*-{SERVING}-*"))

    @property
    def all_served(self) -> bool:
        """Whether every living worker has left such a note."""
        notes = self._generations.folder / "notes"
        return all(any(notes.glob(f"*-{SERVING}-{pid}")) for pid in self._generations.workers())

    async def watch(self) -> None:
        """Follow the shared state until cancelled."""
        while True:
            try:
                await self._follow()
            except Exception:  # the watch must outlive whatever befalls the folder
                LOGGER.exception("following a reload failed")
            await asyncio.sleep(POLL_S)

    async def reload(self) -> dict[str, Any]:
        """Put the file that now lies at the model's path in service, in every worker.

        Returns:
            generation, number of workers.

        Raises:
            Refusal: the file cannot be served, or not by every worker; the old one goes on.
        """
        generations = self._generations
        loop = asyncio.get_running_loop()
        with generations.alone():
            current, _ = generations.state
            following = current + 1
            try:
                copy = partial(generations.add, following, self._settings.model)
                await loop.run_in_executor(None, copy)
            except UserError as error:
                raise Refusal("reload_refused", str(error)) from error
            for note in (generations.folder / "notes").glob(f"{following}-*"):
                note.unlink()  # of an attempt that was withdrawn
            generations.write_state(current, following)
            try:
                await self._all(following, READY)
            except BaseException:
                generations.write_state(current, None)
                raise
            generations.write_state(following, None)
            workers = await self._all(following, SERVING)
        return {"generation": following, "workers": workers}

    async def _all(self, generation: int, kind: str) -> int:
        """Wait until every living worker has left this note; returns how many they are."""
        try:
            async with asyncio.timeout(LOAD_S):
                while True:
                    workers = self._generations.workers()
                    for pid in workers:
                        reason = self._generations.read_note(generation, FAILED, pid)
                        if reason is not None:
                            raise Refusal("reload_refused", reason)
                    if all(self._generations.read_note(generation, kind, pid) for pid in workers):
                        return len(workers)
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            text = f"not every worker was {kind} within {LOAD_S:g} s"
            raise Refusal("reload_refused", text) from error

    async def _follow(self) -> None:
        current, following = self._generations.state
        if self._prepared and self._prepared[0] == current:
            self._mine, served = self._prepared
            self._prepared = None
            self._swap(served)
            self._generations.note(current, SERVING, served.sha256)
        elif following is None:
            self._prepared = self._given_up = None
        elif following not in (self._given_up, self._prepared and self._prepared[0], self._mine):
            await self._prepare(following)

    async def _prepare(self, generation: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            served = await loop.run_in_executor(None, self._load, generation)
        except Exception as error:  # whatever it is, it must reach the caller of the reload
            self._given_up = generation
            reason = str(error).replace(
                str(self._generations.path(generation)), str(self._settings.model)
            )
            self._generations.note(generation, FAILED, reason or type(error).__name__)
            return
        self._prepared = (generation, served)
        self._generations.note(generation, READY, served.sha256)

    def _load(self, generation: int) -> ServedModel:
        path = self._generations.path(generation)
        return ServedModel(dataclasses.replace(self._settings, model=path), self._worker)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
