"""Running a suite: every attack at every radius against every target, nothing made twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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
from training.seeds import derive
from verification.attacks.attack import NOTHING, Attack, Model
from verification.attacks.cache import cached
from verification.attacks.gradient_count import counted
from verification.attacks.outcomes import Mask, Outcomes, Pixels
from verification.attacks.perturbation import encode_fp16
from verification.attacks.query_attack import QueryAttack
from verification.attacks.recorder import Deltas, OutcomeRecorder, Scored
from verification.attacks.rounds import is_over, later_rounds
from verification.attacks.target import Target
from verification.config import SUBSTITUTE

# Stores one attack's images at one radius, for a replay: its name, eps, changes and 8-bit images.
Keep = Callable[[str, float, Deltas, Pixels], None]
Source = tuple[Sequence[nn.Module], str]  # members, and a hash of their weights
ANSWERS = 3  # in the time of one gradient
SMALLER = 0.5  # of the work in the largest ball: what skips broken images does in the smaller ones
LATER = 0.3  # of the images of an attack's first start on the target: those its later ones run on


@dataclass(frozen=True)
class Job:
    """One attack at one radius, from one source.

    Args:
        attack: to run.
        eps: its radius.
        radii: those that the same search passes.
        names: targets that the images are scored on.
        model: the source.
        weights: a hash of it; empty where nothing identifies it.
        share: of the images that it will probably be run on.
    """

    attack: Attack
    eps: float
    radii: Sequence[float]
    names: Sequence[str]
    model: Model
    weights: str
    share: float

    @property
    def work(self) -> int:
        """Gradients of a network for each image in one restart, for progress."""
        members = len(self.model) if isinstance(self.model, Ensemble) else 1
        passes = self.attack.work * self.share / len(self.radii)
        passes /= ANSWERS if self.attack.asks else 1
        return max(round(passes), 1) * max(members, 1)


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
    is never its own surrogate, nor that of its kin. Rounds end, at each radius and for each target,
    as soon as a whole cycle of them breaks almost nothing; the later ones are not run. Attacks that
    skip broken images begin with the largest ball: it holds the smaller ones, so what stood there
    is not attacked again in them. An attack's later starts on a target's own weights leave out the
    images that its earlier ones broke.

    Args:
        suite: the attacks, in order.
        sources: surrogates by name, in evaluation mode on the split's device, and a hash of each.
        targets: by name; the first is the one whose images are kept. `control` is left out by
            attacks that say so.
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
    later = later_rounds(suite)
    jobs = [
        Job(
            *(attack, eps, radii if attack.one_search else [eps], *chosen),
            0.0 if attack in later else _share(attack, len(split), smaller=eps < max(radii)),
        )
        for attack, eps, radii in _in_order(suite, eps_grid)
        for chosen in _pairs(attack, sources, targets)
    ]
    work = sum(job.work * job.attack.restarts for job in jobs)
    with Progress(f"{label}, {len(split)} images", work) as progress:
        for job in jobs:
            attack, eps = job.attack, job.eps
            if all(is_over(attack, suite, recorders[name].outcomes, eps) for name in job.names):
                progress.advance(job.work * attack.restarts)
                continue
            progress.advance(0, f"{attack.name}, eps {eps:g}")
            kept: Scored | None = None
            for restart in range(attack.restarts):
                outcomes = [recorders[name].outcomes for name in job.names]
                ran = _selected(attack, outcomes, suite, eps, seed)
                if restart and attack.source == "target" and not attack.asks:
                    ran &= outcomes[0].unbroken(attack, eps)  # it has one target
                deltas, queries, gradients = _crafted(job, split, (seed, restart), ran)
                outcomes[0].gradients += gradients  # images for several targets are made once
                for name in job.names:
                    found = recorders[name].score(attack, eps, deltas, ran)
                    if queries is not None:
                        recorders[name].outcomes.queries[attack.name, eps] = queries
                    if name == first:
                        kept = found.after(kept)
                progress.advance(job.work)
            if keep is not None and kept is not None:
                keep(attack.name, eps, kept.deltas, kept.quantized)
    return {name: recorder.outcomes for name, recorder in recorders.items()}


def _share(attack: Attack, count: int, *, smaller: bool) -> float:
    sampled = min(attack.sample / count, 1.0) if attack.sample else 1.0
    return sampled * attack.nearest * (SMALLER if smaller and attack.skip_broken else 1.0)


def check_suite(suite: Sequence[Attack], sources: Iterable[str]) -> None:
    """Raise UserError for two attacks of one name, or one whose source is none of these."""
    for name, count in Counter(attack.name for attack in suite).items():
        if count > 1:
            raise UserError(f"{count} attacks are named '{name}'", "a name of its own for each")
    known = ("none", "target", SUBSTITUTE, *sources)
    for attack in suite:
        if attack.source not in known:
            raise UserError(
                f"the attack '{attack.name}' has the source '{attack.source}'",
                f"one of {', '.join(known)}",
            )


def _in_order(
    suite: Sequence[Attack], eps_grid: Sequence[float]
) -> Iterator[tuple[Attack, float, list[float]]]:
    """Yield every attack with each of its radii, and all of them.

    Neighbours that skip broken images take turns at one radius before the next smaller one.
    """
    for skips, block in groupby(suite, key=lambda attack: attack.skip_broken):
        own = [
            (each, [*map(float, eps_grid)] if each.only_eps is None else [each.only_eps])
            for each in block
        ]
        found = [(attack, eps, radii) for attack, radii in own for eps in radii]
        yield from sorted(found, key=lambda item: -item[1]) if skips else found


def _pairs(
    attack: Attack, sources: Mapping[str, Source], targets: Mapping[str, Target]
) -> list[tuple[list[str], Model, str]]:
    """Return every source of an attack, and its hash, with the targets scored on its images."""
    if attack.source == "none":
        return [(list(targets), NOTHING, "")]
    if attack.source != "target":
        if attack.source not in sources:  # no substitute
            return []
        members, weights = sources[attack.source]
        names = [
            name
            for name, target in targets.items()
            if weights != target.weights and weights not in target.kin
        ]
        if attack.source == SUBSTITUTE:  # of the first target alone
            names = [name for name in names if name == next(iter(targets))]
        names = [name for name in names if attack.control or name != "control"]
        return [(names, Ensemble(members).eval(), weights)] if names else []
    chosen = [name for name in targets if attack.control or name != "control"]
    return [
        ([name], *access) for name in chosen if (access := attack.access(targets[name])) is not None
    ]


def _selected(
    attack: Attack, outcomes: Sequence[Outcomes], suite: Sequence[Attack], eps: float, seed: int
) -> Mask:
    """Return the images an attack is run on: all, a sample, or those some target gets right.

    An image that another threat has broken is not skipped: each threat has its own figure.
    """
    count = len(outcomes[0].clean)
    ran = np.ones(count, dtype=bool)
    if attack.sample:
        order = np.random.default_rng(derive(seed, "sample")).permutation(count)
        ran[order[attack.sample :]] = False
    if attack.skip_broken:
        ran &= np.any([_left(attack, outcome, suite, eps) for outcome in outcomes], axis=0)
    return ran


def _left(attack: Attack, outcome: Outcomes, suite: Sequence[Attack], eps: float) -> Mask:
    """Return the images that are left to an attack that skips broken ones.

    They stand in this ball, and the attack's kind has broken them in the next larger one, if it
    was run there.
    """
    alike = [each for each in suite if each.threat == attack.threat]
    others = [each for each in alike if each is not attack]
    left = outcome.nearest(outcome.robust(others, eps), eps, attack.threat, attack.nearest)
    skipping = {each.name for each in alike if each.skip_broken}
    larger = [radius for name, radius in outcome.ran if name in skipping and radius > eps]
    return left & ~outcome.robust(alike, min(larger)) if larger else left


def _crafted(
    job: Job, split: Split, seed: tuple[int, int], ran: Mask
) -> tuple[Deltas, npt.NDArray[np.int64] | None, int]:
    """Return an attack's images as float16 changes, made or from the cache.

    The queries spent on each image and the number of gradients are returned with them.

    The search of one that passes every radius is made at the first of them.

    Args:
        job: what is run.
        split: clean images and labels.
        seed: of the suite, and the number of the restart.
        ran: bool `[n]`: images to run the attack on.
    """
    attack, radii = job.attack, list(job.radii)
    networks = list(job.model) if isinstance(job.model, Ensemble) else []
    key = [
        "craft",
        attack.to_json(),
        radii,
        list(seed),
        split.sha256,
        job.weights,
        [str(getattr(member, "compute", None)) for member in networks[:1]],
        str(split.images.device.type),
        "all" if ran.all() else sha256(np.packbits(ran).tobytes()),
    ]

    def make() -> dict[str, npt.NDArray[Any]]:
        part = split.take(torch.from_numpy(np.flatnonzero(ran)).to(split.images.device))
        deltas = np.zeros((len(radii), *split.images.shape), dtype=np.float16)
        # -1 where an attack does not count them.
        queries = np.full((len(radii), len(split)), 0 if isinstance(attack, QueryAttack) else -1)
        gradients = 0
        if len(part):
            names = (seed[0], attack.name, ",".join(map(str, radii)), seed[1])
            images = to_float(part.images)
            try:
                with counted(networks) as count:
                    crafted = attack.run_radii(job.model, images, part.labels, radii, *names)
                    gradients = count()
            finally:
                if isinstance(job.model, Ensemble):
                    job.model.eval()  # whatever an attack of a user's own left it in
            for at, (eps, made) in enumerate(zip(radii, crafted, strict=True)):
                deltas[at, ran] = encode_fp16(made.images, part.images, eps, attack.norm)
                if made.queries is not None:
                    queries[at] = 0
                    queries[at, ran] = made.queries
        return {"halves": deltas, "queries": queries, "gradients": np.array(gradients)}

    identified = bool(job.weights) or attack.source == "none"
    found = cached(key, make) if identified and attack.cacheable else make()
    at = radii.index(job.eps)
    queries = found["queries"][at]
    spent = None if (queries < 0).any() else queries
    return found["halves"][at], spent, int(found["gradients"])
