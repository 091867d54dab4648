"""The `dverge` command: what ties train, export, verify-robustness and serve together.

Nothing heavy is imported here; each command reaches for its room when it runs.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
import warnings
from typing import Annotated, NoReturn

import typer

from dverge_serve import __version__
from dverge_serve.errors import Exit, PeerError, UserError, printable, rename_parameters

TRAIN = (
    *("torch", "torchvision", "onnx", "onnxscript", "safetensors", "sklearn", "scipy"),
    "matplotlib",
)
EXTRAS = dict.fromkeys(TRAIN, "train") | dict.fromkeys(("onnx2torch", "pyautoattack"), "audit")
EXTRAS |= dict.fromkeys(("mlflow", "pandas"), "mlflow")

# What the machine says no to; other errors of files are mistakes of ours.
NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP}
NOT_OURS |= {errno.ENAMETOOLONG}
NO_MEMORY = "DefaultCPUAllocator"  # in the RuntimeError that torch raises where the CPU's is full

app = typer.Typer(
    name="dverge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train DVERGE ensembles, fuse them into one ONNX graph, measure how they stand up to "
    "attack, and serve them over HTTP.",
    epilog="The whole way on embedded images: dverge demo",
)


@app.callback(invoke_without_command=True)
def dverge(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="With --version: of the libraries, too.")
    ] = False,
) -> None:
    """Hold the options that stand before any command."""
    if version:
        if not verbose:
            typer.echo(f"dverge {__version__}")
            raise typer.Exit
        from dverge_serve.engine.environment import software

        for each in software():
            typer.echo(f"{each.what} {each.found}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


dverge.__doc__ = None  # the app's own help speaks instead


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors go to standard error in one line."""
    # Each registers its commands, in the order help shows them.
    from dverge_serve.cli import train, export, verify, serve, predict  # noqa: F401, I001, RUF100
    from dverge_serve.cli import inspect, card, mlflow, bench, bento, sign, doctor  # noqa: F401, I001, RUF100

    from dverge_serve.progress import show

    show()
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments or ["--help"], prog_name="dverge", standalone_mode=False)
    except PeerError as error:  # the process that failed says why
        return int(error.exit_code)
    except UserError as error:
        return _say(as_flags(str(error)), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", Exit.INTERRUPTED)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            return _bug()
        verb = next((word for word in arguments if not word.startswith("-")), "this command")
        text = f"`dverge {verb}` needs {error.name}, which is not installed; "
        return _say(text + f"pip install 'dverge-serve[{extra}]'", Exit.USER)
    except OSError as error:
        if error.errno not in NOT_OURS:
            return _bug()
        return _say(f"cannot use {error.filename or 'the disk'} ({error.strerror})", Exit.USER)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which nothing here imports
            smaller = "lower batch_size, or " if "train" in arguments else ""
            return _say(f"the device's memory is full; {smaller}use --device cpu", Exit.USER)
        if isinstance(error, MemoryError) or NO_MEMORY in str(error):
            return _say("not enough memory; lower batch_size, width or members", Exit.USER)
        # Usage errors know how to say themselves, whichever click Typer stands on.
        describe = getattr(error, "format_message", None)
        return _say(f"{describe()} (see --help)", Exit.USER) if callable(describe) else _bug()
    if code == Exit.INTERRUPTED:  # some versions of Typer turn Ctrl-C into this code, silently
        return _say("interrupted", Exit.INTERRUPTED)
    return int(code or 0)


def as_flags(text: str) -> str:
    """Return a library's message with options in place of the parameters that it names."""
    from dverge_serve.cli.sign import PASSWORD

    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {
        option.strip("-").replace("-", "_"): option
        for command in commands
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    return rename_parameters(text, options | {"overrides": "--set", "password": PASSWORD})


def main() -> NoReturn:
    """Run the command line of this process; warnings go to standard error in one line each."""
    for stream in (sys.stdout, sys.stderr):  # a class or file name must not stop a command
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"dverge: {message}", err=True)
    sys.exit(run(sys.argv[1:]))


def _say(text: str, code: Exit) -> int:
    short = re.sub(r"\S{300,}", lambda word: f"{word[0][:140]}...{word[0][-140:]}", printable(text))
    typer.echo(f"dverge: {' '.join(short.split())}", err=True)
    return int(code)


def _bug() -> int:
    traceback.print_exc()
    typer.echo(
        f"dverge {__version__}: this is a bug of ours; please report it with the lines above.",
        err=True,
    )
    return int(Exit.BUG)
