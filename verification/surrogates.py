"""Surrogates that are trained: as an attacker could, from seeds that no run uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch

from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder, canonical_json, sha256
from training.config import MAX_SEED, Config, Verification
from training.data.splits import TrainingData
from training.models.pretrained import Start
from training.models.resnet import deeper, family
from training.runs.directory import Run
from training.schedules import Dverge, Transfer
from training.trainer import train
from verification.surrogate import Origin, Surrogate, alone, opened

VERSION = 1  # raise when training changes what the same settings give


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
        data=replace(config.data, path="", group="", test_limit=0, memory_gb=None, workers=None),
        start=_each((config.start,) if isinstance(config.start, str) else config.start, int(size)),
        tensorboard=False,
        dverge=Dverge(),
        transfer=Transfer(),
        verification=Verification(),
    )
    if method == "standard":
        return base
    if method == "mixed":
        relatives = [] if config.pretrained else [other for each in own for other in family(each)]
        chosen = tuple(dict.fromkeys([*own, *relatives]))
        return replace(base, architecture=_each(chosen, int(size)))
    if method == "deeper":
        other = deeper(own[0])
        return replace(base, architecture=other, start="", weights="") if other else None
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

    Those are published networks, one in each file; the members of an ensemble begin nothing else.

    Args:
        config: of the model.
        run: the model's, which knows what the files held.

    Returns:
        the settings, without `start` and `weights` where surrogates begin at random; and why they
        do, if the model did not.
    """
    if not config.pretrained:
        return config, ""
    bare = replace(config, start="", weights="")
    try:
        start = Start.read(config)
    except UserError as error:
        return bare, f"{error.found}"
    if start is None or not start.published:
        told = "the file holds an ensemble: where attackers have it, give it as one of `surrogates`"
        return bare, told
    if run is not None and run.checkpoint.get("start", start.files) != start.files:
        return bare, "the files hold other weights by now"
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
        found += opened(each.parts, Origin.of_run(run), run.members(), device)
    return found
