"""The reference pages of the documentation, made from the code: `python -m tests.docs.reference`.

Each page is what the program itself says: the help of every command, the fields and comments of the
configuration, the OpenAPI document, the signatures and docstrings of the Python interface.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import typer

import tests.docs.python_reference as python
import training.config
import training.recipe
from dverge_serve.cli import app, run
from dverge_serve.serving.app import App
from dverge_serve.serving.responses import CODES
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.worker import Worker

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
WIDTH = 100
NOTE = "<!-- Made by `make reference` from the code; change it there. -->\n\n"


def pages() -> dict[str, str]:
    """Return every reference page by its file's name."""
    made = {"cli.md": cli(), "recipes.md": recipes(), "http.md": http(), "settings.md": settings()}
    made["python.md"] = python.page()
    return {name: NOTE + text for name, text in made.items()}


def cli() -> str:
    """Return the help of every command."""
    run(["--version"])  # registers the commands
    (_, whole), *commands = _commands(typer.main.get_command(app), "dverge")
    parts = ["# Command line\n", f"```\n{whole}\n```\n"]
    parts += [f"## {name}\n\n```\n{text}\n```\n" for name, text in commands]
    parts.append(
        "## Exit codes\n\n| code | means |\n|---|---|\n"
        "| 0 | done; for a verification: VALID |\n"
        "| 1 | a requirement is not met: `--min-accuracy`, a replay with other figures, an export "
        "that differs from its network |\n"
        "| 2 | a mistake of the user or a problem of the environment; one line says which |\n"
        "| 3 | the verification is INCONCLUSIVE or INVALID, even if `--min-accuracy` is met |\n"
        "| 70 | a bug in this project |\n"
        "| 130 | interrupted; `dverge serve` ends with 0 at Ctrl-C |\n\n"
        "## Shell completion\n\n`dverge --install-completion` installs completion for the current "
        "shell;\n`dverge --show-completion` prints it.\n"
    )
    return "\n".join(parts)


def _commands(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the help of a command and, for a group, of what is in it."""
    yield name, _help(command, name)
    for part, each in getattr(command, "commands", {}).items():
        yield from _commands(each, f"{name} {part}")


def _help(command: Any, name: str) -> str:
    with command.make_context(name, ["--help"], resilient_parsing=True, terminal_width=WIDTH) as at:
        return str(command.get_help(at)).rstrip()


def recipes() -> str:
    """Return every key of a recipe with its default and its comment, and the recipes shipped."""
    parts = [
        "# Recipes\n\nA recipe is a TOML file: `dverge train --recipe mine.toml`. `--set` changes "
        "any key for one run:\n`--set dverge.epochs=10`. `dverge train --dry-run` prints the "
        "values that a run would use.\n"
    ]
    for prefix, cls in _tables(training.config.Config, ""):
        text = (inspect.getdoc(cls) or "").strip()
        parts.append(f"## {f'`[{prefix}]`' if prefix else 'Top level'}\n\n{text}\n")
        parts.append("| key | kind | default | |\n|---|---|---|---|")
        comments = python.comments_of(cls)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]) or field.name.startswith("_"):
                continue
            key = f"{prefix}.{field.name}" if prefix else field.name
            default = "-" if field.default is dataclasses.MISSING else _toml(field.default)
            words = comments.get(field.name, "")
            kind = _kind(hints[field.name])
            parts.append(f"| `{key}` | {kind} | {default} | {python.escape(words)} |")
        parts.append("")
    parts.append("## The recipes that ship\n")
    for name in training.recipe.recipe_names():
        found = resources.files("training") / "recipes" / f"{name}.toml"
        parts.append(f"### {name}\n\n```toml\n{found.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def _tables(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    yield prefix, cls
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _tables(hint, f"{prefix}.{name}" if prefix else name)


def _kind(hint: Any) -> str:
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin is tuple:
        inner = "numbers" if float in options or int in options else "names"
        return f"list of {inner}" if options[-1] is Ellipsis else f"list of {len(options)} {inner}"
    if options:
        return " or ".join(_kind(option) for option in options if option is not type(None))
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}[hint]


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(_plain(part) for part in value)}]`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:.6g}"


def settings() -> str:
    """Return the service's settings with their documentation."""
    (node,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(node, ast.ClassDef)
    rows = []
    for line, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(line.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            default = getattr(Settings(), line.target.id)
            shown = {"": "none", None: "unset"}.get(default, f"`{default}`")
            words = python.escape(" ".join(str(text.value.value).split()))
            rows.append(f"| `DVERGE_{line.target.id.upper()}` | {shown} | {words} |")
    return (
        "# Settings of the service\n\nThe service reads these environment variables when it "
        "starts. It refuses to start with a value that it\ncannot use, and names the variable."
        "\n\n| variable | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def http() -> str:
    """Return the routes, the answer of `/predict` and the error codes."""
    document = App(Worker(Settings(token="-")), expose="full").routes.document
    parts = [
        "# HTTP\n\n`GET /openapi.json` of a running service is this page for programs, with the "
        "schemas, limits and examples of\nits configuration. If a token is set, every route needs "
        'it, except those marked "no token".\n\n## Routes\n',
        "| route | does | answers |\n|---|---|---|",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = ", ".join(sorted(operation["responses"]))
            lock = "" if operation.get("security") else " (no token)"
            parts.append(
                f"| `{method.upper()} {path}` | {operation['summary']}{lock} | {statuses} |"
            )
    parts.append(
        "\n## One prediction\n\n`POST /predict` answers with one of these for each image, in "
        "the order of the images.\n"
    )
    parts.append("| field | shown under `DVERGE_EXPOSE` | kind |\n|---|---|---|")
    shown = {level: _prediction(level) for level in ("label", "scores", "full")}
    for name, schema in shown["full"].items():
        levels = ", ".join(f"`{level}`" for level, fields in shown.items() if name in fields)
        words = schema.get("description", "")
        kind = schema["type"] + (f": {words}" if words else "")
        parts.append(f"| `{name}` | {levels} | {kind} |")
    parts.append(
        "\n`suspicious` is present only if a report for exactly this model file, with a threshold, "
        "is next to the file.\n"
        '\n## Errors\n\n`{"error": {"code": "...", "message": "..."}}`; under `/v2` the '
        "protocol's "
        'own `{"error": "..."}` with\nthe code in `X-Error-Code`.\n\n| status | codes |\n|---|---|'
    )
    for status in sorted(set(CODES.values())):
        codes = ", ".join(f"`{code}`" for code, found in CODES.items() if found == status)
        parts.append(f"| {status} | {codes} |")
    return "\n".join(parts) + "\n"


def _prediction(expose: Any) -> dict[str, Any]:
    schemas = App(Worker(Settings()), expose=expose).routes.document["components"]["schemas"]
    items = schemas["Predictions"]["properties"]["predictions"]["items"]
    found: dict[str, Any] = items["properties"]
    return found


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
