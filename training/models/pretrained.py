"""Starting weights: members that begin from safetensors files instead of a random draw."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json, sha256
from training.config import Config
from training.models.member import Member
from training.models.state_dict import fit, parse
from training.published_weights import paths

PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin
CONVERT = "where you trust it, convert it with safetensors.torch.save_file(torch.load(FILE), OUT)"


@dataclass(frozen=True)
class Weights:
    """One member's weights in a file.

    Args:
        name: of the file, for messages.
        tensors: by name.
        shared: other members start from the same ones.
    """

    name: str
    tensors: dict[str, Tensor]
    shared: bool


@dataclass(frozen=True)
class Start:
    """The files that `start` names, read.

    Args:
        weights: for each member.
        files: name and sha256 of each file, for the run's record.
    """

    weights: list[Weights]
    files: list[dict[str, str]]

    @classmethod
    def read(cls, config: Config) -> Start | None:
        """Read what `config.start` or else `config.weights` names: None where neither is set.

        Raises:
            UserError: a missing or damaged file, one that is not safetensors, or one that holds
                another number of members.
        """
        named = (config.start,) if isinstance(config.start, str) else config.start
        if not any(named):
            if not config.weights:
                return None
            named = paths(config.architectures, config.weights)
        files, networks = [], []
        for name in named:
            content = _content(Path(name))
            digest = sha256(content)
            files.append({"file": Path(name).name, "sha256": digest})
            for index, tensors in enumerate(_networks(_parse(content, name))):
                networks.append(((digest, index), name, tensors))
        if len(networks) == 1:
            networks *= config.members
        if len(networks) != config.members:
            raise UserError(
                f"{' and '.join(named)} {'hold' if len(named) > 1 else 'holds'} {len(networks)} "
                f"members, the run has {config.members}",
                f"{config.members} members, or one model for all to start from",
                f"use `members` {len(networks)}",
            )
        counts = Counter(key for key, _, _ in networks)
        return cls([Weights(name, held, counts[key] > 1) for key, name, held in networks], files)

    @property
    def sha256(self) -> str:
        """Hash of all the files."""
        return sha256(canonical_json([file["sha256"] for file in self.files]))

    @property
    def published(self) -> bool:
        """Whether each file holds one network, as published ones do, not the members of a run."""
        count = len(self.files)
        return count == len(self.weights) or (count == 1 and self.weights[0].shared)

    def put_into(self, members: Sequence[Member]) -> None:
        """Give the members their weights.

        A last layer stays the member's own random draw where the file's is for other classes, and
        where several members share a file: they would be equal, and stay so, otherwise.

        Raises:
            UserError: tensors are missing, foreign, of other shapes or not finite.
        """
        for index, (member, weights) in enumerate(zip(members, self.weights, strict=True)):
            # A plain network knows nothing of normalisation, nor did older BatchNorms count.
            optional = {name for name in member.state_dict() if name.endswith("_tracked")}
            fit(
                member,
                _named_for(member, weights),
                file=weights.name,
                who=f"member {index}",
                optional=optional | {"mean", "std"},
                unused=_drawn(weights, member),
            )

    def complete(self, members: Sequence[Member]) -> bool:
        """Return whether every member gets all of its weights, its last layer's among them."""
        return not any(self.drawn(members))

    def drawn(self, members: Sequence[Member]) -> list[bool]:
        """Return of each member whether its last layer is its own random draw."""
        pairs = zip(members, self.weights, strict=True)
        return [bool(_drawn(weights, member)) for member, weights in pairs]

    def describe(self, config: Config, members: Sequence[Member]) -> str:
        """Return a line that says what the weights are used for."""
        names = " and ".join(file["file"] for file in self.files)
        if skipped(config, members, self):
            return f"the weights in {names} stand for standard training, which is skipped"
        drawn = "fitted to their features" if config.head_views else "drawn at random"
        last = "" if self.complete(members) else f"; last layers are {drawn}"
        return f"standard training begins from {names}{last}"


def skipped(config: Config, members: Sequence[Member], start: Start | None) -> int:
    """Return how many epochs of standard training the starting weights stand for: all or none."""
    stand = start is not None and config.method != "standard" and start.complete(members)
    return config.standard.epochs if stand else 0


def _drawn(weights: Weights, member: Member) -> set[str]:
    """Return which tensors stay the member's own random draw: its last layer's, or none."""
    own, given, last = member.state_dict(), _named_for(member, weights), _last_layer(member)
    other_classes = any(
        given[name].shape != own[name].shape and given[name].shape[1:] == own[name].shape[1:]
        for name in last & given.keys()
    )
    return last if weights.shared or other_classes else set()


def last_layer(member: Member) -> tuple[str, nn.Module]:
    """Return the layer that gives the logits, the last that is registered, with its name."""
    return [
        (name, module)
        for name, module in member.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ][-1]


def _last_layer(member: Member) -> set[str]:
    """Return the names of the tensors of the layer that gives the logits."""
    name, layer = last_layer(member)
    return {f"{name}.{key}" for key in layer.state_dict()}


def _named_for(member: Member, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors by the member's own names, where they are torchvision's."""
    own, tensors = member.state_dict().keys(), weights.tensors
    inside = {f"network.{name}": tensor for name, tensor in tensors.items()}
    return tensors if own & tensors.keys() or not own & inside.keys() else inside


def _networks(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each member's tensors in a run's file, or the one network's in any other."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"member(\d+)\.(.+)", key)
        if not match:
            return [tensors]
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    return [found[index] for index in sorted(found)] or [tensors]


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(
            f"the starting weights {path} are a folder",
            "a safetensors file",
            f"a run's are {path / 'members.safetensors'}",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the starting weights {path} ({error.strerror})", "a safetensors file"
        ) from error


def _parse(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        return parse(content, name)
    except UserError as error:
        if not content.startswith(PICKLES):  # only now: a safetensors file may begin so, too
            raise
        try:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as refused:  # torch raises many kinds
            raise UserError(
                f"{name} is a pickle that holds more than tensors, and loading it would run code",
                "a safetensors file, or a state dict saved by torch.save",
                CONVERT,
            ) from refused
        if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
            raise UserError(f"{name} is no state dict", "tensors by name") from error
        return found
