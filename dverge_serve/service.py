"""The BentoML service that `bentofile.yaml` names: `bentoml serve` runs our application in it.

BentoML supervises the workers and speaks HTTP; every request goes straight to `App`. Its own
routes, metrics and validation stay out of the way: they count unknown paths without bound, take
bodies of any size and answer in other shapes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before BentoML reads it: no usage reports are sent. It wants the word, not a digit.
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml
import click
import uvicorn.config
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.utils.analytics import usage_stats

from dverge_serve.errors import Exit, UserError
from dverge_serve.serving import logs, tracing
from dverge_serve.serving.requests import Receive, Scope, Send
from dverge_serve.serving.settings import Log, Settings, as_variables
from dverge_serve.serving.sockets import beyond_loopback, require_free

if TYPE_CHECKING:
    from dverge_serve.serving.app import App

# A container's own network keeps others out until a port of it is published.
HOST = "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1"  # noqa: S104
PORT = 3000
FAILED, SUPERVISOR = "failed", "supervisor"
ORPHAN_CHECK_S = 1.0

# `bentoml serve` has asked, and remembered the answer, before it imports this file.
usage_stats.do_not_track.cache_clear()


def in_worker() -> bool:
    """Whether this process serves requests, rather than supervising those that do."""
    return bentoml.server_context.worker_index is not None


if not in_worker():
    # BentoML keeps the counters of all its servers in one folder and empties it as each starts.
    # A folder of our own, unguessable and not yet made, keeps two services apart.
    _folder = Path(tempfile.gettempdir()) / f"dverge-{secrets.token_hex(8)}"
    BentoMLContainer.prometheus_multiproc_dir.set(str(_folder / "metrics"))


class DvergeService(bentoml.Service):  # type: ignore[misc]
    """A BentoML service whose HTTP is `App`'s; BentoML's application runs its lifespan."""

    def to_asgi(self, is_main: bool = True) -> Any:
        """Return the ASGI application that a worker runs."""
        # What uvicorn takes unless told otherwise, and BentoML tells it nothing.
        uvicorn.config.HTTP_PROTOCOLS["auto"] = "dverge_serve.serving.protocol:Protocol"
        bento = super().to_asgi(is_main=is_main)
        app = application()
        http = tracing.traced(app)

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            target = bento if scope["type"] == "lifespan" else http
            await target(scope, receive, send)

        return serve


@functools.cache
def application() -> App:
    """Return this worker's application, made at the first call."""
    # Imported here: the supervisor and the command line need none of it.
    from dverge_serve.serving.app import App
    from dverge_serve.serving.metrics import forget_dead_workers
    from dverge_serve.serving.worker import Worker

    settings = service_settings()
    logs.set_up(settings.log)
    forget_dead_workers()
    number = bentoml.server_context.worker_index or 1
    exposed = beyond_loopback()
    if exposed and not settings.token and number == 1:
        logs.LOGGER.warning(
            "listening beyond this machine without a token: anyone who reaches the port may call; "
            "set DVERGE_TOKEN"
        )
    return App(
        Worker(settings, number=number, folder=_run_folder(), on_failure=_give_up),
        expose=settings.expose or ("scores" if exposed else "full"),
    )


def _give_up(error: UserError) -> None:
    """End the server if none of its workers ever served, as restarted workers would fail again.

    After that, only the worker that cannot load ends.
    """
    folder = _run_folder()
    if folder is None or application().worker.has_served:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    with contextlib.suppress(OSError):
        (folder / FAILED).write_text(str(error))
    if not _orphaned(folder):
        os.kill(os.getppid(), signal.SIGTERM)


def _orphaned(folder: Path) -> bool:
    """Return whether the supervisor was killed; this worker's parent is then another process."""
    return os.getppid() != _supervisor(folder)


@functools.cache
def _supervisor(folder: Path) -> int:
    # Noted down by the supervisor: it may have died before this worker came so far.
    try:
        return int((folder / SUPERVISOR).read_text())
    except FileNotFoundError:
        return -1  # it has, and another worker removed the folder


async def _end_with_supervisor(folder: Path) -> None:
    """End this worker once its supervisor was killed, so that the port is free again."""
    while not _orphaned(folder):
        await asyncio.sleep(ORPHAN_CHECK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _run_folder() -> Path | None:
    """Return the folder that the workers of this server share; None outside a server."""
    metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(metrics).parent if metrics and in_worker() else None


def _workers() -> int:
    # At import nothing is refused yet: check() says what is wrong with the value.
    try:
        return Settings.from_environment().workers
    except UserError:
        return 1


@bentoml.service(
    service_class=DvergeService,
    name="dverge",
    workers=_workers(),
    http={"host": HOST, "port": PORT},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Dverge:
    """Image classification by an ensemble that is hard to attack."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Refuse to start on a model, a setting or a port that cannot be used."""
        folder = Path(BentoMLContainer.prometheus_multiproc_dir.get()).parent
        atexit.register(_clean_up, folder)
        from dverge_serve.serving import supervisor

        log: Log = "text"
        try:
            settings = service_settings()
            log = settings.log
            logs.set_up(log)
            check_model(settings)
            tracing.check()
            require_free(*_address())
            _share(folder, settings)
            if os.name == "posix":
                supervisor.take_over()
        except UserError as error:
            if log == "json":
                logs.LOGGER.error("%s", as_variables(error))
            else:
                print(f"dverge: {as_variables(error)}", file=sys.stderr, flush=True)  # noqa: T201
            raise SystemExit(Exit.USER) from error

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Begin to load the model."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: logs.note_failure(context["message"], context.get("exception"))
        )
        if os.name == "posix":
            # A closed terminal tells the supervisor, too; what is to happen is its to say.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        await application().start()
        if (folder := _run_folder()) is not None:
            self.watch = asyncio.create_task(_end_with_supervisor(folder))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Finish what is queued."""
        await application().stop()
        folder = _run_folder()
        if folder is not None and _orphaned(folder):  # nobody else is left to remove it
            shutil.rmtree(folder, ignore_errors=True)


def service_settings() -> Settings:
    """Return the settings, with absolute paths.

    They count from the folder that the service was loaded from: inside a Bento that is not the
    folder it was started in.
    """
    settings = Settings.from_environment()
    folder = Path(Dverge.working_dir)  # type: ignore[attr-defined]
    keys: dict[str, Any] = {
        name: str(folder / value)
        for name in ("model_public_key", "model_certificate")
        if (value := getattr(settings, name))
    }
    return dataclasses.replace(settings, model=folder / settings.model, **keys)


def _address() -> tuple[str, int]:
    """Return where `bentoml serve` was told to listen."""
    context = click.get_current_context(silent=True)
    options = context.params if context else {}
    return options.get("host") or HOST, options.get("port") or PORT


def check_model(settings: Settings) -> None:
    """Load the model and its report once, so that an error is told before any worker starts.

    Raises:
        UserError: it cannot be served.
    """
    # Imported here, as below: what a supervisor needs once and a worker's import need not wait for.
    from dverge_serve.engine.session import Engine, check_device
    from dverge_serve.engine.signature import verify
    from dverge_serve.serving.model_report import read_model_report

    if trust := settings.trust:  # before anything else reads the file
        verify(settings.model, trust)
    # On the CPU even where workers take the GPU: the supervisor must not hold memory there.
    expected = settings.model_sha256
    with Engine(settings.model, device="cpu", threads=1, expected_sha256=expected) as engine:
        check_device(settings.device, engine.card.precision)
        read_model_report(settings.model, engine.sha256)


def _share(folder: Path, settings: Settings) -> None:
    """Copy the model for the workers: a worker restarted later loads what the others serve."""
    from dverge_serve.serving.reload import ModelVersions

    folder.chmod(0o700)
    (folder / SUPERVISOR).write_text(str(os.getpid()))
    ModelVersions(folder, settings.trust).begin(settings.model)


def _clean_up(folder: Path) -> None:
    failed = (folder / FAILED).exists()
    shutil.rmtree(folder, ignore_errors=True)
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(Exit.USER)  # the supervisor was asked to end, and would say that all went well
