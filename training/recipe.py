"""Recipes: named settings inside the package or in a user's TOML file, and what changes them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError, nearest
from training.config import DATASETS, NATIVE, Config
from training.config_parsing import assign

# A data set's recipe, and what differs from it. No published recipe is for the last three; they are
# trained as long as the recipe's epochs say.
UNBOUND = {"standard.budget": 0, "dverge.budget": 0}
SUITED: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "cifar10": ("cifar10", {}),
    "cifar100": ("images", {"name": "cifar100", **UNBOUND}),
    "svhn": ("images", {"name": "svhn", "data.flip": False, **UNBOUND}),
    "fashion-mnist": (
        "images",
        {"name": "fashion-mnist", "data.mode": "L", "data.crop": [28, 28], **UNBOUND},
    ),
}


def recipe_names() -> list[str]:
    """Return the names of the recipes inside the package."""
    folder = resources.files("training") / "recipes"
    return sorted(
        item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")
    )


def load_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a recipe, by its name in the package or as a TOML file, and apply overrides.

    Args:
        recipe: `digits`, or a path ending in `.toml`.
        overrides: dotted keys to values, e.g. `{"dverge.epochs": 10}`.

    Raises:
        UserError: no such recipe, an unknown key, a value of the wrong type or out of range.
    """
    recipe = str(recipe)
    if recipe.endswith(".toml"):
        where, name = recipe, Path(recipe).stem
        try:
            text = Path(recipe).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read recipe {recipe}", "a TOML file") from error
    else:
        where, name = f"recipe '{recipe}'", recipe
        if recipe not in recipe_names():
            raise UserError(
                f"unknown recipe '{recipe}'",
                next_step=f"{nearest(recipe, recipe_names())} (or a path ending in .toml)",
            )
        found = resources.files("training") / "recipes" / f"{recipe}.toml"
        text = found.read_text(encoding="utf-8")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML ({error})") from error
    table.setdefault("name", name)
    changes = dict(overrides or {})
    for key in overrides or {}:
        stage, _, setting = key.rpartition(".")
        if setting == "epochs":  # who asks for epochs gets them, whatever the recipe's budget
            changes.setdefault(f"{stage}.budget", 0)
    for key, value in changes.items():
        assign(table, key, value, f"`overrides` {key}")
    _complete(table)
    return Config.from_json(table, where)


def _complete(table: dict[str, Any]) -> None:
    """Complete a recipe's `data` by the preprocessing of the published weights it names, if any."""
    weights, data = table.get("weights"), table.setdefault("data", {})
    if not weights or not isinstance(weights, str) or not isinstance(data, dict):
        return  # what is of the wrong type is refused later
    from training.published_weights import find, preprocessing

    named = table.get("architecture", Config.architecture)
    first = named if isinstance(named, str) else str(next(iter(named), ""))
    table["data"] = preprocessing(
        find(first, weights), data, resized=data.get("name") not in NATIVE
    )


def recipe_for(data: str | None, *, weights: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the recipe that suits what `--data` names, and what it changes there.

    Args:
        data: a data set by name, or a folder of images; none: the embedded digits.
        weights: published ones are named, too.
    """
    return SUITED.get(data or "digits", ("photographs" if weights else "images", {}))


def data_overrides(data: str | Path) -> dict[str, Any]:
    """Return what `--data` changes: a data set by name, a folder of images or a CSV file.

    Raises:
        UserError: it is none of them.
    """
    if str(data) in DATASETS:
        return {"data.name": str(data), "data.path": ""}
    path = Path(data)
    if not (path.is_dir() or (path.suffix.lower() == ".csv" and path.is_file())):
        raise UserError(
            f"{data} is no folder" if path.exists() else f"no folder {data}",
            "a folder of train/<class>/ and test/<class>/, a CSV file, or a data set's name",
            nearest(str(data), SUITED),
        )
    return {"data.name": "imagefolder", "data.path": str(Path(data).resolve())}


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `--set key=value` pairs; values are TOML, bare words are strings."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"`overrides` {pair}", "key=value, e.g. `overrides` dverge.epochs=10")
        try:
            parsed[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[key.strip()] = text.strip()
    return parsed
