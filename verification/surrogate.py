"""A surrogate: networks that an attacker could have, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dverge_serve.files import canonical_json, sha256
from export.parity import torch_scores
from export.published_checkpoint import Published, as_source
from export.source import ExportSource, from_run
from training.config import Config
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.state_dict import network_sha256
from training.runs.directory import Run
from verification.gradients import ready

UNKNOWN = "unknown"  # how a published file was trained that does not say so


@dataclass(frozen=True)
class Origin:
    """A finished run or a published file whose networks are surrogates.

    Args:
        kind: which of the two.
        name: the run's, or the file's.
        sha256: of the weights.
        method: of their training.
        architectures: of all its networks, in order.
        source: reads them again, for export.
        config: of their training; None of a published file.
        seed: of their training, where it is known.
        start: name and hash of each file that they began from.
        holdout_accuracy: of all its networks together, measured in training.
    """

    kind: Literal["run", "published"]
    name: str
    sha256: str
    method: str
    architectures: tuple[str, ...]
    source: Callable[[], ExportSource]
    config: Config | None = None
    seed: int | None = None
    start: Sequence[Mapping[str, str]] = ()
    holdout_accuracy: float | None = None

    @classmethod
    def of_run(cls, run: Run) -> Origin:
        """Return a finished run as an origin."""
        return cls(
            "run",
            run.config.name,
            run.weights_sha256,
            run.config.method,
            run.config.architectures,
            partial(from_run, run),
            run.config,
            run.config.seed,
            run.checkpoint.get("start", []),
            run.checkpoint["holdout_accuracy"],
        )

    @classmethod
    def of_file(
        cls, path: Path, found: Published, labels: tuple[str, ...], crop: tuple[int, int]
    ) -> Origin:
        """Return a published file as an origin, for a model of these classes and image size."""
        return cls(
            "published",
            path.name,
            found.sha256,
            found.method or UNKNOWN,
            (found.resnet.architecture,) * len(found.members),
            partial(as_source, path, found, labels, crop=crop),
        )


@dataclass(frozen=True)
class Surrogate:
    """Some networks of one origin, attacked together by their mean logits.

    Args:
        name: in the suite.
        origin: where they come from.
        indices: which of its networks they are.
        members: the networks themselves, to take gradients from.
        networks: a hash of each one's weights, by which they are known wherever they come from.
    """

    name: str
    origin: Origin
    indices: tuple[int, ...]
    members: Sequence[Member]
    networks: frozenset[str]

    @property
    def weights(self) -> str:
        """Hash of the weights."""
        return part_sha256(self.origin.sha256, self.indices, len(self.origin.architectures))

    @property
    def whole(self) -> bool:
        """Whether it has all networks of its origin."""
        return len(self.indices) == len(self.origin.architectures)

    @property
    def undefended(self) -> bool:
        """Whether no defence is known of its networks."""
        return self.origin.method in ("standard", UNKNOWN)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The architecture of each network."""
        return tuple(self.origin.architectures[index] for index in self.indices)

    def shares(self, networks: Collection[str]) -> bool:
        """Return whether it has any of these networks."""
        return not self.networks.isdisjoint(networks)

    def to_json(self) -> dict[str, Any]:
        """Return its entry in the report."""
        origin, found = self.origin, list(dict.fromkeys(self.architectures))
        return {
            "name": self.name,
            "kind": origin.kind,
            "method": origin.method,
            "architecture": found[0] if len(found) == 1 else found,
            "members": len(self.members),
            "of": {
                "run" if origin.kind == "run" else "file": origin.name,
                "members": list(self.indices),
            },
            "seed": origin.seed,
            **({"epochs": origin.config.standard.epochs} if origin.config else {}),
            "start": list(origin.start),
            "weights_sha256": self.weights,
            # Measured in training, of all networks together.
            "holdout_accuracy": origin.holdout_accuracy if self.whole else None,
        }


def opened(
    parts: Mapping[str, tuple[int, ...]],
    origin: Origin,
    members: Sequence[Member],
    device: torch.device,
) -> list[Surrogate]:
    """Return surrogates of an origin, each of some of its members, ready to attack from.

    Args:
        parts: the indices of each, by its name.
        origin: of the members.
        members: all of them, in order.
        device: where gradients will be taken.
    """
    made = [ready(member, device, lowered=True) for member in members]
    hashes = [network_sha256(member) for member in made]
    return [
        Surrogate(
            name,
            origin,
            indices,
            [made[index] for index in indices],
            frozenset(hashes[index] for index in indices),
        )
        for name, indices in parts.items()
    ]


def part_sha256(whole: str, indices: Sequence[int], members: int) -> str:
    """Return a hash of some of an origin's members: its own hash, where they are all."""
    if len(indices) == members:
        return whole
    return sha256(canonical_json([whole, list(indices)]))


def alone(name: str, members: int) -> dict[str, tuple[int, ...]]:
    """Return the names of the members of an ensemble as surrogates of one network each."""
    if members == 1:
        return {}
    return {f"member {index} of {name}": (index,) for index in range(members)}


def control_among(
    surrogates: Sequence[Surrogate], model: Config, run: Run | None = None
) -> Surrogate | None:
    """Return the surrogate that is the model's control; None where its run's standard members are.

    Another surrogate must be able to attack it, which shares no network with it. Of those the
    first undefended one with as many networks of the model's architectures, else the first
    undefended one, else the first. A run's own members from before its method come first if it
    trained them itself. Where given weights stood for that, nobody knows whether those have a
    defence: an undefended surrogate like them is preferred.
    """
    if run is not None and not run.checkpoint.get("skipped_epochs"):
        return None
    able = [
        each for each in surrogates if not all(other.shares(each.networks) for other in surrogates)
    ]
    undefended = [each for each in able if each.undefended]
    alike = [each for each in undefended if each.architectures == model.architectures]
    return next(iter(alike if run else [*alike, *undefended, *able]), None)


def clean_accuracies(surrogates: Sequence[Surrogate], split: Split) -> dict[str, float]:
    """Return each surrogate's share of right answers on the test images, by its name."""
    images, labels = to_float(split.images), split.labels.cpu().numpy()
    logits: dict[int, npt.NDArray[np.float32]] = {}
    for each in surrogates:
        for member in each.members:
            if id(member) not in logits:
                logits[id(member)] = torch_scores(Ensemble([member]), images).logits
    return {
        each.name: float(
            (np.mean([logits[id(member)] for member in each.members], 0).argmax(1) == labels).mean()
        )
        for each in surrogates
    }
