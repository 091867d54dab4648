"""Running a suite: every attack at every radius against every target, nothing made twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.progress import Progress
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from verification.attacks.attack import NOTHING, Attack, Model
from verification.attacks.cache import cached
from verification.attacks.outcomes import Mask, Outcomes, Pixels
from verification.attacks.perturbation import encode_fp16
from verification.attacks.recorder import Deltas, OutcomeRecorder, Scored
from verification.attacks.target import Target

# Stores one attack's images at one radius, for a replay: its name, eps, changes and 8-bit images.
Keep = Callable[[str, float, Deltas, Pixels], None]
Source = tuple[Sequence[nn.Module], str]  # members, and a hash of their weights


@dataclass(frozen=True)
class Job:
    """One attack at one radius, from one source.

    Args:
        attack: to run.
        eps: its radius.
        names: targets that the images are scored on.
        model: the source.
        weights: a hash of it; empty where nothing identifies it.
    """

    attack: Attack
    eps: float
    names: Sequence[str]
    model: Model
    weights: str

    @property
    def work(self) -> int:
        """Passes through a network in one restart, for progress."""
        members = len(self.model) if isinstance(self.model, Ensemble) else 1
        return max(round(self.attack.work * self.attack.nearest), 1) * max(members, 1)


def run_suite(
    suite: Sequence[Attack],
    sources: Mapping[str, Source],
    targets: Mapping[str, Target],
    split: Split,
    eps_grid: Sequence[float],
    *,
    seed: int,
    keep: Keep | None = None,
    label: str = "attacking",
) -> dict[str, Outcomes]:
    """Attack every target with every attack at every radius.

    Transfer images are crafted once and scored on all targets: the same attack for each. A target
    is never its own surrogate, nor that of its kin.

    Args:
        suite: the attacks, in order: those that skip broken images come last.
        sources: surrogates by name, in evaluation mode on the split's device, and a hash of each.
        targets: by name; the first is the one whose images are kept.
        split: test images.
        eps_grid: radii.
        seed: of every random draw.
        keep: stores the first target's adversarial images.
        label: of the progress.

    Raises:
        UserError: two attacks of one name, or one whose source is not there.
    """
    check_suite(suite, sources)
    recorders = {name: OutcomeRecorder(target.engine, split) for name, target in targets.items()}
    first = next(iter(targets))
    jobs = [
        Job(attack, eps, *chosen)
        for attack in suite
        for chosen in _pairs(attack, sources, targets)
        for eps in ([attack.only_eps] if attack.only_eps is not None else map(float, eps_grid))
    ]
    work = sum(job.work * job.attack.restarts for job in jobs)
    with Progress(f"{label}, {len(split)} images", work) as progress:
        for job in jobs:
            attack, eps = job.attack, job.eps
            kept: Scored | None = None
            for restart in range(attack.restarts):
                outcomes = [recorders[name].outcomes for name in job.names]
                ran = _selected(attack, outcomes, suite, eps)
                deltas, queries = _crafted(job, split, (seed, restart), ran)
                for name in job.names:
                    found = recorders[name].score(attack, eps, deltas, ran)
                    if attack.threat == "queries":
                        recorders[name].outcomes.queries[attack.name, eps] = queries
                    if name == first:
                        kept = found.after(kept)
                progress.advance(job.work, f"{attack.name}, eps {eps:g}")
            if keep is not None and kept is not None:
                keep(attack.name, eps, kept.deltas, kept.quantized)
    return {name: recorder.outcomes for name, recorder in recorders.items()}


def check_suite(suite: Sequence[Attack], sources: Iterable[str]) -> None:
    """Raise UserError for two attacks of one name, or one whose source is none of these."""
    for name, count in Counter(attack.name for attack in suite).items():
        if count > 1:
            raise UserError(f"{count} attacks are named '{name}'", "a name of its own for each")
    known = ("none", "target", *sources)
    for attack in suite:
        if attack.source not in known:
            raise UserError(
                f"the attack '{attack.name}' has the source '{attack.source}'",
                f"one of {', '.join(known)}",
            )


def _pairs(
    attack: Attack, sources: Mapping[str, Source], targets: Mapping[str, Target]
) -> list[tuple[list[str], Model, str]]:
    """Return every source of an attack, and its hash, with the targets scored on its images."""
    if attack.source == "none":
        return [(list(targets), NOTHING, "")]
    if attack.source != "target":
        members, weights = sources[attack.source]
        names = [
            name
            for name, target in targets.items()
            if weights != target.weights and weights not in target.kin
        ]
        return [(names, Ensemble(members).eval(), weights)] if names else []
    chosen = list(targets) if attack.control else list(targets)[:1]
    return [
        ([name], *access) for name in chosen if (access := attack.access(targets[name])) is not None
    ]


def _selected(
    attack: Attack, outcomes: Sequence[Outcomes], suite: Sequence[Attack], eps: float
) -> Mask:
    """Return the images an attack is run on: all, or those some target still gets right.

    An attack whose threat has a figure of its own skips no image broken by another threat.
    """
    if not attack.skip_broken:
        return np.ones(len(outcomes[0].clean), dtype=bool)
    others = [
        each
        for each in suite
        if each.name != attack.name and attack.threat in ("queries", each.threat)
    ]
    chosen = [
        outcome.nearest(outcome.robust(others, eps), eps, attack.threat, attack.nearest)
        for outcome in outcomes
    ]
    return np.asarray(np.any(chosen, axis=0))


def _crafted(
    job: Job, split: Split, seed: tuple[int, int], ran: Mask
) -> tuple[Deltas, npt.NDArray[np.int64]]:
    """Return an attack's images as float16 changes and the queries spent, made or from the cache.

    Args:
        job: what is run.
        split: clean images and labels.
        seed: of the suite, and the number of the restart.
        ran: bool `[n]`: images to run the attack on.
    """
    attack, eps = job.attack, job.eps
    first = list(job.model)[:1] if isinstance(job.model, Ensemble) else []
    key = [
        "craft",
        attack.to_json(),
        eps,
        list(seed),
        split.sha256,
        job.weights,
        [str(getattr(member, "compute", None)) for member in first],
        str(split.images.device.type),
        sha256(np.packbits(ran).tobytes()) if attack.skip_broken else "all",
    ]

    def make() -> dict[str, npt.NDArray[Any]]:
        part = split.take(torch.from_numpy(np.flatnonzero(ran)).to(split.images.device))
        deltas = np.zeros(tuple(split.images.shape), dtype=np.float16)
        queries = np.zeros(len(split), dtype=np.int64)
        if len(part):
            names = (seed[0], attack.name, str(eps), seed[1])
            try:
                made = attack.run(job.model, to_float(part.images), part.labels, eps, *names)
            finally:
                if isinstance(job.model, Ensemble):
                    job.model.eval()  # whatever an attack of a user's own left it in
            deltas[ran] = encode_fp16(made.images, part.images, eps, attack.norm)
            queries[ran] = 0 if made.queries is None else made.queries
        return {"halves": deltas, "queries": queries}

    identified = bool(job.weights) or attack.source == "none"
    found = cached(key, make) if identified and attack.cacheable else make()
    return found["halves"], found["queries"]
