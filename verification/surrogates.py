"""Surrogates: networks that an attacker could train, from seeds that no run uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder, canonical_json, sha256
from training.config import MAX_SEED, Config, Verification
from training.data.splits import TrainingData
from training.models.member import Member
from training.models.pretrained import Start
from training.models.resnet import deeper, family
from training.runs.directory import Run
from training.schedules import Dverge
from training.trainer import train
from verification.gradients import ready

VERSION = 1  # raise when training changes what the same settings give


@dataclass(frozen=True)
class Surrogate:
    """Some networks of a finished run, attacked together by their mean logits.

    Args:
        name: in the suite.
        run: which trained them.
        indices: which of its members they are.
        members: the networks themselves, to take gradients from.
    """

    name: str
    run: Run
    indices: tuple[int, ...]
    members: Sequence[Member]

    @property
    def weights(self) -> str:
        """Hash of the weights."""
        return part_sha256(self.run.weights_sha256, self.indices, self.run.config.members)

    @property
    def whole(self) -> bool:
        """Whether it has all networks of its run."""
        return len(self.indices) == self.run.config.members

    @property
    def architectures(self) -> list[str]:
        """The architectures of the networks, each once."""
        own = self.run.config.architectures
        return list(dict.fromkeys(own[index] for index in self.indices))

    def shares(self, weights: str, indices: Iterable[int] | None = None) -> bool:
        """Return whether it has networks of a run: of these members, or of any."""
        same = self.run.weights_sha256 == weights
        return same and (indices is None or not {*indices}.isdisjoint(self.indices))

    def to_json(self) -> dict[str, Any]:
        """Return its entry in the report."""
        config, found = self.run.config, self.architectures
        return {
            "name": self.name,
            "method": config.method,
            "architecture": found[0] if len(found) == 1 else found,
            "members": len(self.members),
            "of": {"run": config.name, "members": list(self.indices)},
            "seed": config.seed,
            "epochs": config.standard.epochs,
            "start": self.run.checkpoint.get("start", []),
            "weights_sha256": self.weights,
            # Measured in training, of all networks together.
            "holdout_accuracy": self.run.checkpoint["holdout_accuracy"] if self.whole else None,
        }


def attackable(surrogates: Sequence[Surrogate]) -> Surrogate | None:
    """Return the first surrogate that another one, which shares no network with it, can attack."""
    for each in surrogates:
        if not all(other.shares(each.run.weights_sha256, each.indices) for other in surrogates):
            return each
    return None


@dataclass(frozen=True)
class SurrogateSet:
    """Networks that are trained at once, and the surrogates that are made of them.

    Args:
        config: how they are trained.
        sizes: of the ensembles among the surrogates, each its first members.
    """

    config: Config
    sizes: tuple[int, ...]

    @property
    def mixed(self) -> bool:
        """Whether they are of kind `mixed`, which the paper does not have."""
        return self.config.name.startswith("surrogate-mixed-")

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The surrogates by name, each with its members: the ensembles, then every one alone."""
        stem = self.config.name.rpartition("-")[0]
        found = {f"{stem}-{size}": tuple(range(size)) for size in self.sizes}
        return found | alone(self.config.name, self.config.members)

    def folder(self, data: TrainingData) -> Path:
        """Return the folder of their run in the cache.

        Its name has a hash of everything that shapes the networks.
        """
        start = Start.read(self.config)
        settings = self.config.to_json() | ({"start": start.sha256} if start else {})
        key = sha256(canonical_json([VERSION, settings, data.train.sha256]))
        kind = self.config.name.removeprefix("surrogate-")
        return cache_folder() / "surrogates" / f"{kind}-{key[:24]}"


def part_sha256(whole: str, indices: Sequence[int], members: int) -> str:
    """Return a hash of some of a run's members: the run's own hash, where they are all."""
    if len(indices) == members:
        return whole
    return sha256(canonical_json([whole, list(indices)]))


def alone(name: str, members: int) -> dict[str, tuple[int, ...]]:
    """Return the names of the members of an ensemble as surrogates of one network each."""
    if members == 1:
        return {}
    return {f"member {index} of {name}": (index,) for index in range(members)}


def surrogate_config(config: Config, kind: str) -> Config | None:
    """Return the settings of a surrogate: those of the defended model's first stage.

    Same data and schedule, another seed: a surrogate that differs more would make the model look
    more robust than it is. `standard` has the model's own architecture, `mixed` that and its
    relatives, `deeper` another one; `dverge` is the defence itself from another seed,
    `adversarial` a lightly adversarially trained one. All begin from the model's own starting
    weights, where `config.start` names some; those fit no other architecture.

    Args:
        config: of the defended model.
        kind: method and members, e.g. `standard-3`.

    Returns:
        None where this version cannot train that kind.
    """
    method, _, size = kind.rpartition("-")
    named = config.architecture
    own = (named,) if isinstance(named, str) else named
    base = replace(
        config,
        name=f"surrogate-{kind}",
        method="standard",
        architecture=_each(own, int(size)),
        members=int(size),
        seed=MAX_SEED + int(size),
        data=replace(config.data, path="", test_limit=0, memory_gb=None, workers=None),
        start=_each((config.start,) if isinstance(config.start, str) else config.start, int(size)),
        tensorboard=False,
        dverge=Dverge(),
        verification=Verification(),
    )
    if method == "standard":
        return base
    if method == "mixed":
        relatives = [] if config.start else [other for each in own for other in family(each)]
        chosen = tuple(dict.fromkeys([*own, *relatives]))
        return replace(base, architecture=_each(chosen, int(size)))
    if method == "deeper":
        other = deeper(own[0])
        return replace(base, architecture=other, start="") if other else None
    if method == "dverge":
        return replace(base, method="dverge", dverge=config.dverge)
    if method == "adversarial":
        # Lightly: at the smallest radius that is evaluated (Springer et al., 2021).
        eps = min(config.verification.eps)
        light = replace(config.adversarial, eps=eps, step_size=eps / 4)
        return replace(base, method="adversarial", adversarial=light)
    return None


def _each(named: tuple[str, ...], size: int) -> str | tuple[str, ...]:
    """Return one name for each of so many members; the name alone where it is the only one."""
    return named[0] if len(named) == 1 else tuple(islice(cycle(named), size))


def with_known_start(config: Config, run: Run | None) -> tuple[Config, str]:
    """Return a model's settings with the starting weights that surrogates can begin from, too.

    Those are published networks, one in each file; members of a run are nobody else's.

    Args:
        config: of the model.
        run: the model's, which knows what the files held.

    Returns:
        the settings, without `start` where surrogates begin at random; and why they do, if the
        model did not.
    """
    if not config.start:
        return config, ""
    try:
        start = Start.read(config)
    except UserError as error:
        return replace(config, start=""), f"{error.found}"
    if start is None or not start.published:
        return replace(config, start=""), "the weights are a run's, which attackers do not have"
    if run is not None and run.checkpoint.get("start", start.files) != start.files:
        return replace(config, start=""), "the files hold other weights by now"
    return config, ""


def surrogate_sets(config: Config, kinds: Sequence[str]) -> list[SurrogateSet]:
    """Return what must be trained for surrogates of these kinds.

    Kinds that differ in size alone are one set: the largest is trained, the others are its first
    members. Kinds that this version cannot train are left out.
    """
    sizes: dict[str, list[int]] = {}
    for kind in kinds:
        method, _, size = kind.rpartition("-")
        sizes.setdefault(method, []).append(int(size))
    found = {method: surrogate_config(config, f"{method}-{max(n)}") for method, n in sizes.items()}
    return [
        SurrogateSet(wanted, tuple(sorted(sizes[method])))
        for method, wanted in found.items()
        if wanted is not None
    ]


def surrogates(
    sets: Sequence[SurrogateSet], data: TrainingData, device: torch.device
) -> list[Surrogate]:
    """Return the surrogates of these sets, training those not in the cache.

    An interrupted training continues where it stopped; one that runs in another process is waited
    for.
    """
    found = []
    for each in sets:
        folder = each.folder(data)
        run = train(
            each.config, folder, device=device, resume=True, data=data, wait=True, surrogate=True
        )
        found += _opened(each.parts, run, device)
    return found


def given_surrogates(
    folder: Path, labels: Sequence[str], shape: tuple[int, ...], device: torch.device
) -> list[Surrogate]:
    """Return the finished runs in a folder as surrogates for a model of these classes and input.

    Raises:
        UserError: none there, or one with other classes or another input.
    """
    runs = sorted(path.parent for path in folder.glob("*/checkpoint.json"))
    if not runs:
        raise UserError(f"no finished run in {folder}", "a folder of run directories")
    found = []
    for path in runs:
        run = Run.open_finished(path)
        if run.labels != tuple(labels):
            raise UserError(
                f"the surrogate {path} has {len(run.labels)} classes ({', '.join(run.labels[:3])})",
                f"the model's {len(labels)} ({', '.join(labels[:3])})",
            )
        if (found_shape := run.config.data.preprocess.shape) != shape:
            raise UserError(f"the surrogate {path} takes {found_shape}", f"the model's {shape}")
        size = run.config.members
        parts = {path.name: tuple(range(size))} | alone(path.name, size)
        found += _opened(parts, run, device)
    return found


def _opened(parts: dict[str, tuple[int, ...]], run: Run, device: torch.device) -> list[Surrogate]:
    members = [ready(member, device, lowered=True) for member in run.members()]
    return [
        Surrogate(name, run, indices, [members[index] for index in indices])
        for name, indices in parts.items()
    ]
