"""Starting weights: members that begin from weights files instead of a random draw."""

from __future__ import annotations

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
from training.models.published_resnet import PublishedResNet, is_published, published_names
from training.models.state_dict import fit
from training.models.weights_file import Network, WeightsFile
from training.published_weights import paths


@dataclass(frozen=True)
class Weights:
    """One member's weights in a file.

    Args:
        file: its name, for messages.
        network: the weights, and the normalisation that belongs to them.
        shared: other members start from the same ones.
    """

    file: str
    network: Network
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
            UserError: a file that `WeightsFile.read` refuses, another number of members in it, or
                published ResNets of another architecture.
        """
        named = (config.start,) if isinstance(config.start, str) else config.start
        if not any(named):
            if not config.weights:
                return None
            named = paths(config.architectures, config.weights)
        files, networks = [], []
        for name in named:
            found = WeightsFile.read(Path(name))
            files.append({"file": Path(name).name, "sha256": found.sha256})
            for index, network in enumerate(found.networks):
                networks.append(((found.sha256, index), name, network))
        if len(networks) == 1:
            networks *= config.members
        if len(networks) != config.members:
            raise UserError(
                f"{' and '.join(named)} {'hold' if len(named) > 1 else 'holds'} {len(networks)} "
                f"members, the run has {config.members}",
                f"{config.members} members, or one model for all to start from",
                f"use `members` {len(networks)}",
            )
        for index, (_, name, network) in enumerate(networks):
            _check_architecture(network, name, config, index)
        counts = Counter(key for key, _, _ in networks)
        return cls([Weights(name, held, counts[key] > 1) for key, name, held in networks], files)

    @property
    def sha256(self) -> str:
        """Hash of all the files."""
        return sha256(canonical_json([file["sha256"] for file in self.files]))

    @property
    def published(self) -> bool:
        """Whether each file holds one network, from which surrogates can begin, and no ensemble."""
        count = len(self.files)
        return count == len(self.weights) or (count == 1 and self.weights[0].shared)

    def put_into(self, members: Sequence[Member]) -> None:
        """Give the members their weights.

        A last layer stays the member's own random draw where the file's is for other classes, and
        where several members share a file: they would be equal, and stay so, otherwise. A
        normalisation that belongs to the weights replaces the member's.

        Raises:
            UserError: tensors are missing, foreign, of other shapes or not finite.
        """
        for index, (member, weights) in enumerate(zip(members, self.weights, strict=True)):
            # A plain network knows nothing of normalisation, nor did older BatchNorms count.
            optional = {name for name in member.state_dict() if name.endswith("_tracked")}
            fit(
                member,
                weights.network.tensors | _normalisation(weights),
                file=weights.file,
                who=f"member {index}",
                names=_names(member, weights.network.tensors),
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
    own, last = member.state_dict(), _last_layer(member)
    names, tensors = _names(member, weights.network.tensors), weights.network.tensors
    given = {name: tensors[names[name]].shape for name in last if names[name] in tensors}
    other_classes = any(
        shape != own[name].shape and shape[1:] == own[name].shape[1:]
        for name, shape in given.items()
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


def _names(member: Member, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return what the file calls each of the member's tensors: as a run does, or as published."""
    own = member.state_dict().keys()
    inside = {f"network.{name}": name for name in tensors}
    same = {name: name for name in own}
    if own & inside.keys() and not own & tensors.keys():  # torchvision's names
        return same | {name: inside[name] for name in own & inside.keys()}
    return published_names(own, tensors) if is_published(tensors) else same


def _normalisation(weights: Weights) -> dict[str, Tensor]:
    """Return the mean and deviation that belong to the weights, where they are known."""
    mean, std = weights.network.mean, weights.network.std
    if not mean and is_published(weights.network.tensors):
        known = PublishedResNet.recognise(weights.network, weights.file)
        mean, std = known.mean, known.std
    pairs = {"mean": mean, "std": std} if mean else {}
    return {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in pairs.items()}


def _check_architecture(network: Network, file: str, config: Config, index: int) -> None:
    """Refuse a published ResNet that is not what the settings say of its member."""
    if not is_published(network.tensors):
        return
    found, wanted = PublishedResNet.recognise(network, file), config.architectures[index]
    if (found.architecture, found.width) != (wanted.removesuffix("-leaky"), config.width):
        raise UserError(
            f"{file} holds a {found}, member {index} is a {wanted} of width {config.width}",
            "weights of the same network",
            f"use `architecture` {found.architecture} and `width` {found.width}",
        )
