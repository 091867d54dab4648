"""A list of members: safetensors files, and a small TOML file that says what they are.

name = "mine"
labels = ["cat", "dog"]            # or "cifar10", or a text file with one class a line
mean = [0.49, 0.48, 0.45]          # per channel, pixels in [0,1]
std = [0.20, 0.20, 0.20]

[image]                            # as in a recipe's [data]
mode = "RGB"
crop = [32, 32]

[[member]]
file = "first.safetensors"         # one member's tensors, named as `dverge train` names them
architecture = "resnet20"
width = 16
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError, nearest
from dverge_serve.files import sha256
from export.published_checkpoint import read_labels
from export.source import ExportSource, config_json, without_images
from training.config import Config
from training.models.build import build_members
from training.models.member import Member
from training.models.state_dict import fit, parse, tensors_of

KEYS = ("name", "labels", "mean", "std", "image", "member")
MEMBER_KEYS = ("file", "architecture", "width")


def from_list(path: str | Path) -> ExportSource:
    """Read the members that a TOML file lists, for `export`.

    Raises:
        UserError: the list or a file in it is not what the module's head shows, in one line.
    """
    path = Path(path)
    table = _table(path)
    entries = table["member"]
    labels = _labels(table["labels"], path)
    members: list[Member] = []
    data = b""
    for entry in entries:
        config = _config(table, [entry], path)
        file = path.parent / str(entry["file"])
        try:
            read = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {file} ({error.strerror})", f"a member of {path}"
            ) from error
        tensors = parse(read, file)
        if tensors_of(tensors, 1):
            raise UserError(
                f"{file} holds several members", "a file with one", "export its run instead"
            )
        (member,) = build_members(config, len(labels), config.data.mean, config.data.std)
        fit(
            member,
            tensors_of(tensors, 0) or tensors,
            file=str(file),
            who=f"a {entry['architecture']}",
            optional=("mean", "std"),  # the list's, where the file carries none
        )
        members.append(member.eval().requires_grad_(False))
        data += read
    config = _config(table, entries, path)
    card = Card(
        name=config.name,
        labels=labels,
        preprocess=config.data.preprocess,
        channel_order=config.data.mode,
        members=len(members),
        dataset=config.data.name,
        training=config_json(config),
        source="member-list",
        weights_sha256=sha256(data),
        tool_version=__version__,
    )
    return without_images(members, card, config)


def _table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})", "a TOML list of members") from error
    _keys(table, KEYS, str(path), needed=("labels", "mean", "std", "member"))
    entries = table["member"]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no member", "[[member]] tables")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: member {number} is {entry!r}", "a [[member]] table")
        _keys(entry, MEMBER_KEYS, f"{path}: member {number}", needed=("file", "architecture"))
    return table


def _keys(
    table: dict[str, Any], known: tuple[str, ...], where: str, *, needed: tuple[str, ...]
) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'", next_step=nearest(key, known))
    for key in needed:
        if key not in table:
            raise UserError(f"{where} has no '{key}'", f"the keys {', '.join(known)}")


def _labels(labels: Any, path: Path) -> tuple[str, ...]:
    if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
        if len(set(labels)) != len(labels):
            raise UserError(f"{path}: a label comes twice", "different labels")
        return tuple(labels)
    if isinstance(labels, str):
        return read_labels(labels if labels == "cifar10" else str(path.parent / labels))
    raise UserError(f"{path}: labels = {labels!r}", "names, 'cifar10' or a file")


def _config(table: dict[str, Any], entries: list[dict[str, Any]], path: Path) -> Config:
    """Return the settings these members would have been trained with, as far as they are known."""
    image = table.get("image", {})
    if not isinstance(image, dict):
        raise UserError(f"{path}: image = {image!r}", "an [image] table")
    names = [entry["architecture"] for entry in entries]
    settings: dict[str, Any] = {
        "name": table.get("name", path.stem),
        "method": "standard",
        "architecture": names[0] if len(set(map(str, names))) == 1 else names,
        "members": len(entries),
        "data": {**image, "mean": table["mean"], "std": table["std"]},
    }
    if "width" in entries[0]:
        settings["width"] = entries[0]["width"]
    return Config.from_json(settings, str(path))
