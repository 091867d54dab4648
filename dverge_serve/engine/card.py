"""The model card: the metadata in `model.onnx`, its schema and its versions."""

from __future__ import annotations

import json
from dataclasses import Field, dataclass, field, fields
from importlib import resources
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess

SCHEMA_VERSION = 1
OPSET = 18
METADATA_KEY = "dverge"
INPUT = "images"
LOGITS = "logits"
MEMBER_LOGITS = "member_logits"
KEY = "key"

FusionMode = Literal["branches", "grouped"]  # a branch a member, or grouped convolutions
Precision = Literal["fp32", "fp16", "int8"]
LARGEST_GROUP = 4  # members in one network; the features of more leave the cache between layers


def members_per_group(members: int) -> int:
    """Return the number of members in one grouped network; the last network may have fewer."""
    networks = -(-members // LARGEST_GROUP)
    return -(-members // networks)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The metadata of a model file, under the key `dverge`.

    A reader accepts its own schema version and older ones, and refuses newer ones by name. A field
    is a key of `model.schema.json`: of its own name, or where the first files of this version lack
    it the dotted one under `KEY`.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    labels: tuple[str, ...]
    channel_order: str = "RGB"  # "L" for grayscale
    preprocess: Preprocess
    members: int
    combination: str = "mean-logits"
    # Or "published-checkpoint", "member-list": where `training` is assumed.
    source: str = field(default="run", metadata={KEY: "source"})
    form: FusionMode = field(default="branches", metadata={KEY: "fusion.form"})
    # The device the form was chosen for.
    target: str = field(default="cpu", metadata={KEY: "fusion.target"})
    # Which images parity was checked on: "held-out" or "synthetic".
    probe: str = field(default="held-out", metadata={KEY: "parity.images"})
    dataset: str
    training: dict[str, Any] = field(default_factory=dict)  # the run's configuration, no paths
    weights_sha256: str  # of the run's members.safetensors
    parent_sha256: str | None = None  # of the fp32 file, in precision variants
    precision: Precision = "fp32"
    tool_version: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one input image."""
        return self.preprocess.shape

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form kept under the metadata key."""
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Preprocess):
                value = value.to_json()
            outer, key = _place(each)
            holder = found.setdefault(outer, {}) if outer else found
            holder[key] = list(value) if isinstance(value, tuple) else value
            if key == "labels":
                found["input_shape"] = list(self.input_shape)
        return found

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], file: str) -> Card:
        """Read the card from an ONNX file's metadata.

        Args:
            metadata: the ONNX `metadata_props`.
            file: the file's name, for errors.

        Raises:
            UserError: the file is not one of ours, or its schema is newer than this reader.
        """
        if METADATA_KEY not in metadata:
            raise UserError(
                f"{file} carries no '{METADATA_KEY}' metadata",
                "a model written by `dverge export`",
            )
        try:
            value = json.loads(metadata[METADATA_KEY])
            version = int(value["schema_version"])
            if version <= SCHEMA_VERSION:
                return cls._from_json(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file} has damaged '{METADATA_KEY}' metadata ({type(error).__name__}: {error})",
                "a model written by `dverge export`",
            ) from error
        raise UserError(
            f"{file} has schema version {version}",
            f"version {SCHEMA_VERSION} or older",
            "upgrade dverge-serve to read it",
        )

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Card:
        kinds = get_type_hints(cls)
        found: dict[str, Any] = {}
        for each in fields(cls):
            outer, key = _place(each)
            holder = value.get(outer, {}) if outer else value
            if key in holder or not each.metadata:
                found[each.name] = _read(kinds[each.name], holder[key])
        card = cls(**found)
        if tuple(value["input_shape"]) != card.input_shape:
            raise ValueError(f"input_shape {value['input_shape']} is not {card.input_shape}")
        if len(card.labels) < 2 or card.members < 1:
            raise ValueError("fewer than two labels, or no member")
        return card


def model_schema() -> dict[str, Any]:
    """Return the JSON Schema of the card's JSON form, as it ships in the package."""
    file = resources.files("dverge_serve.engine") / "model.schema.json"
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema


def _place(of: Field[Any]) -> tuple[str, str]:
    """Return where a field is in the JSON: the enclosing object ("" for the card), and the key."""
    outer, _, key = of.metadata.get(KEY, of.name).rpartition(".")
    return outer, key


def _read(kind: Any, value: Any) -> Any:
    """Convert a JSON value to the type of its field."""
    if kind is Preprocess:
        return Preprocess.from_json(value)
    if get_origin(kind) is tuple:
        return tuple(str(part) for part in value)
    if get_origin(kind) is dict:
        return dict(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"'{value}' is none of {', '.join(get_args(kind))}")
        return value
    return kind(value) if kind in (str, int) else value
