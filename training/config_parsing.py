"""Typed settings: dataclasses from TOML and JSON tables, with every key and value checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal, TypeVar

from dverge_serve.errors import UserError, nearest

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
MOST = 2**63  # what arrays and random generators take


def check(key: str, value: Any, holds: bool, expected: str) -> None:
    """Refuse a key's value unless it `holds`.

    Raises:
        UserError: it does not; what was `expected` is said.
    """
    if not holds:
        raise UserError(f"{key} = {value}", expected)


def assign(table: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a value into nested tables under a dotted key, e.g. `dverge.epochs`.

    Raises:
        UserError: a part of the key is no table; `where` is named.
    """
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"{where}: '{parent}' is not a table")
    table[last] = value


T = TypeVar("T")


def build(cls: type[T], table: dict[str, Any], where: str, prefix: str) -> T:
    """Return the dataclass `cls` of a table, with defaults where the table is silent.

    Args:
        cls: its public fields name the keys and their types; so do those of dataclasses within.
        table: as TOML or JSON gives it.
        where: where the table is from, for messages.
        prefix: of its keys, for messages.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    hints = {
        key: hint for key, hint in typing.get_type_hints(cls).items() if not key.startswith("_")
    }
    for key in table:
        if key not in hints:
            known = [prefix + name for name in hints]
            raise UserError(
                f"{where}: unknown key '{prefix}{key}'", next_step=nearest(prefix + key, known)
            )
    values = {key: _convert(hints[key], value, where, prefix + key) for key, value in table.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """Return `value` as the type `hint`, which is one of those the dataclasses above use."""
    options = typing.get_args(hint)
    kind = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type[Any], hint), value, where, f"{key}.")
    if kind is Literal:
        if value in options:
            return value
        raise UserError(f"{where}: {key} = {value!r}", f"one of {', '.join(map(str, options))}")
    if kind is tuple and isinstance(value, list | tuple):
        kinds = (options[0],) * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            parts = zip(kinds, value, strict=True)
            return tuple(_convert(kind, part, where, key) for kind, part in parts)
    if type(None) in options:  # "X | None"
        return None if value is None else _convert(options[0], value, where, key)
    if str in options and not isinstance(value, str):  # "str | tuple[str, ...]"
        return _convert(options[1], value, where, key)
    if str in options:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        check(f"{where}: {key}", value, math.isfinite(value), "a finite number")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        check(f"{where}: {key}", value, abs(value) < MOST, f"a whole number below {MOST:,}")
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    ):
        return value
    raise UserError(f"{where}: {key} = {value!r}", _in_words(hint))


def _in_words(hint: Any) -> str:
    """Return a type as a recipe's writer knows it."""
    options = [each for each in typing.get_args(hint) if each not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is not tuple:
        named = [WORDS.get(each, str(each)) for each in options or [hint]]
        return " or ".join(named)
    one = {int: "32", float: "0.5"}.get(options[0], '"a"')
    if len(options) == 2:
        return f"a pair such as [{one}, {one}]"
    return f"a list such as [{one}, {one}, ...]"
