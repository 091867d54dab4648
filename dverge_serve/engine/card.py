"""The model file's contract: what `model.onnx` says about itself, and who may read it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess

SCHEMA_VERSION = 1
OPSET = 18
METADATA_KEY = "dverge"
INPUT = "images"
LOGITS = "logits"
MEMBER_LOGITS = "member_logits"

FusionMode = Literal["branches", "grouped"]  # members side by side, or networks with groups
Precision = Literal["fp32", "fp16", "int8"]
LARGEST_GROUP = 4  # members in one network; the features of more leave the cache between layers


def members_per_group(members: int) -> int:
    """Return how many of so many members make one grouped network; the last may have fewer."""
    networks = -(-members // LARGEST_GROUP)
    return -(-members // networks)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model file carries in its metadata under the key `dverge`.

    A reader accepts its own schema version and older ones, and refuses newer ones by name.
    """

    name: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    members: int
    dataset: str
    weights_sha256: str  # of the run's members.safetensors
    tool_version: str
    training: dict[str, Any] = field(default_factory=dict)  # the run's configuration, no paths
    combination: str = "mean-logits"
    channel_order: str = "RGB"  # "L" for grayscale
    source: str = "run"  # or "published-checkpoint", "member-list": where `training` is assumed
    form: FusionMode = "branches"
    target: str = "cpu"  # the device the form was chosen for
    probe: str = "held-out"  # which images parity was checked on: "held-out" or "synthetic"
    precision: Precision = "fp32"
    parent_sha256: str | None = None  # of the fp32 file, in precision variants
    schema_version: int = SCHEMA_VERSION

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one input image."""
        return self.preprocess.shape

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form kept under the metadata key."""
        return {
            "schema_version": self.schema_version,
            "name": self.name,
            "labels": list(self.labels),
            "input_shape": list(self.input_shape),
            "channel_order": self.channel_order,
            "preprocess": self.preprocess.to_json(),
            "members": self.members,
            "combination": self.combination,
            "source": self.source,
            "fusion": {"form": self.form, "target": self.target},
            "parity": {"images": self.probe},
            "dataset": self.dataset,
            "training": self.training,
            "weights_sha256": self.weights_sha256,
            "parent_sha256": self.parent_sha256,
            "precision": self.precision,
            "tool_version": self.tool_version,
        }

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
        card = cls(
            schema_version=int(value["schema_version"]),
            name=str(value["name"]),
            labels=tuple(str(label) for label in value["labels"]),
            channel_order=str(value["channel_order"]),
            preprocess=Preprocess.from_json(value["preprocess"]),
            members=int(value["members"]),
            combination=str(value["combination"]),
            source=str(value.get("source", "run")),
            form=_one_of(FusionMode, value.get("fusion", {}).get("form", "branches")),
            target=str(value.get("fusion", {}).get("target", "cpu")),
            probe=str(value.get("parity", {}).get("images", "held-out")),
            dataset=str(value["dataset"]),
            training=dict(value["training"]),
            weights_sha256=str(value["weights_sha256"]),
            parent_sha256=value["parent_sha256"],
            precision=_one_of(Precision, value["precision"]),
            tool_version=str(value["tool_version"]),
        )
        if tuple(value["input_shape"]) != card.input_shape:
            raise ValueError(f"input_shape {value['input_shape']} is not {card.input_shape}")
        if len(card.labels) < 2 or card.members < 1:
            raise ValueError("fewer than two labels, or no member")
        return card


def _one_of(kind: Any, value: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"'{value}' is none of {', '.join(get_args(kind))}")
    return value
