"""Commands about the environment: doctor, cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import AsJson
from dverge_serve.errors import UserError, one_of

cache_app = typer.Typer()
app.add_typer(cache_app, name="cache")


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context) -> None:
    """Show or empty the cache."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: dverge doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do.

    Versions, processor, GPU and its libraries, disk and cache; what will be slow or fail, and why.
    """
    from dverge_serve.cli.tables import findings_table
    from dverge_serve.engine.environment import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=2))
    else:
        findings_table(findings)


@cache_app.command("list", epilog="Example: dverge cache list")
def list_(as_json: AsJson = False) -> None:
    """Show what the cache holds: surrogates, attacks, downloaded data."""
    from dverge_serve.cli.tables import cache_table
    from dverge_serve.engine.environment import cache_use
    from dverge_serve.files import cache_folder

    parts = cache_use()
    if as_json:
        told = {"folder": str(cache_folder()), "parts": [dataclasses.asdict(p) for p in parts]}
        typer.echo(json.dumps(told, indent=2))
    else:
        cache_table(parts, cache_folder())


@cache_app.command(epilog="Example: dverge cache prune --days 7")
def prune(
    part: Annotated[
        str | None, typer.Argument(help="One part, as `dverge cache list` names it.")
    ] = None,
    days: Annotated[
        float, typer.Option(help="Keep what was written in the last so many days.")
    ] = 30.0,
) -> None:
    """Delete old entries of the cache; they are made again when needed."""
    from dverge_serve.engine.environment import cache_use, folder_size
    from dverge_serve.files import cache_folder
    from dverge_serve.progress import gigabytes

    names = [each.name for each in cache_use()]
    if part is not None and part not in names:
        raise UserError(f"no part '{part}' in {cache_folder()}", one_of(names) if names else "")
    if not days >= 0:  # NaN is refused, too
        raise UserError(f"--days {days:g}", "0 or more")
    before, count, freed = time.time() - 86_400 * days, 0, 0
    for name in [part] if part else names:
        for entry in sorted((cache_folder() / name).iterdir()):
            if _newest(entry) > before:
                continue
            size = folder_size(entry) if entry.is_dir() else entry.stat().st_size
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
            count, freed = count + 1, freed + size
    typer.echo(f"deleted {count} {'entry' if count == 1 else 'entries'}, {gigabytes(freed)}")


def _newest(entry: Path) -> float:
    """Return when anything in an entry was written last, in seconds since 1970."""
    below = entry.rglob("*") if entry.is_dir() else ()
    times: list[float] = [each.lstat().st_mtime for each in (entry, *below)]
    return max(times)
