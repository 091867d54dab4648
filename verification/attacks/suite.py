"""Running a suite: every attack at every radius against every target, nothing made twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dverge_serve.files import sha256
from dverge_serve.progress import Progress
from training.data.splits import Split, to_float
from training.seeds import derive
from verification.attacks import autoattack as reference
from verification.attacks.attack import Attack, craft
from verification.attacks.cache import keep
from verification.attacks.outcomes import VERSIONS, Mask, Outcomes, Scorer, Target, soft_answers
from verification.attacks.perturbation import (
    count_norm_violations,
    decode_fp16,
    encode_fp16,
    quantize_uint8,
)
from verification.attacks.square import square

Halves = npt.NDArray[np.float16]
Found = tuple[Halves, npt.NDArray[np.uint8], Mask, Mask]
Source = tuple[Sequence[nn.Module], str]  # members, and a hash of their weights


class Evidence(Protocol):
    """Whoever keeps adversarial images for a replay."""

    def add(
        self, attack: str, eps: float, halves: Halves, delivered: npt.NDArray[np.uint8]
    ) -> None:
        """Keep one attack's images at one radius."""


def run_suite(
    suite: Sequence[Attack],
    sources: Mapping[str, Source],
    targets: Mapping[str, Target],
    split: Split,
    eps_grid: Sequence[float],
    *,
    seed: int,
    evidence: Evidence | None = None,
    label: str = "attacking",
) -> dict[str, Outcomes]:
    """Attack every target with every attack at every radius.

    Transfer images are crafted once and scored on all targets: the same attack for each. A target
    is never attacked from itself under the name of transfer.

    Args:
        suite: the attacks, in order: those that skip fallen images come last.
        sources: surrogates by name, in evaluation mode on the split's device, and a hash of each.
        targets: by name; the first is the one whose images are kept as evidence.
        split: test images.
        eps_grid: radii.
        seed: of every random draw.
        evidence: keeps the first target's adversarial images.
        label: of the progress.
    """
    outcomes = {name: start(target, split) for name, target in targets.items()}
    first = next(iter(targets))
    jobs = [
        (attack, names, source, eps)
        for attack in suite
        for names, source in _victims(attack, sources, targets)
        for eps in ([attack.only_eps] if attack.only_eps is not None else eps_grid)
    ]
    units = [attack.work * max(len(source[0]), 1) for attack, _, source, _ in jobs]
    work = sum(unit * job[0].restarts for unit, job in zip(units, jobs, strict=True))
    with Progress(f"{label}, {len(split)} images", work) as progress:
        for (attack, names, source, eps), unit in zip(jobs, units, strict=True):
            kept: Found | None = None
            for restart in range(attack.restarts):
                standing = _standing(attack, [outcomes[name] for name in names], suite, eps)
                scorer = targets[names[0]].engine
                halves, spent = _crafted(
                    attack, source, scorer, split, eps, (seed, restart), standing
                )
                for name in names:
                    found = score(
                        outcomes[name], targets[name], halves, split, attack, eps, standing
                    )
                    if attack.queries:
                        outcomes[name].queries[attack.name, eps] = spent
                    if name == first:
                        kept = _merge(kept, found)
                progress.advance(unit, f"{attack.name}, eps {eps:g}")
            if evidence is not None and kept is not None:
                evidence.add(attack.name, eps, kept[0], kept[1])
    return outcomes


def _victims(
    attack: Attack, sources: Mapping[str, Source], targets: Mapping[str, Target]
) -> list[tuple[list[str], Source]]:
    """Return which targets an attack is run on, with the source of its gradients for each."""
    if attack.source == "none":
        return [(list(targets), ((), ""))]
    if attack.source != "target":
        source = sources[attack.source]
        names = [name for name, target in targets.items() if target.weights != source[1]]
        return [(names, source)] if names else []
    chosen = list(targets) if attack.control else list(targets)[:1]
    if attack.kind == "square":
        engines = [(name, targets[name].engine) for name in chosen]
        return [([name], ((), str(getattr(engine, "sha256", "")))) for name, engine in engines]
    return [
        ([name], (members, targets[name].weights))
        for name in chosen
        if (members := targets[name].members)
    ]


def start(target: Target, split: Split) -> Outcomes:
    """Return the outcomes before any attack: which clean images the target gets right."""
    scores = target.engine.run_all(to_float(split.images).cpu().numpy())
    finite: Mask = np.asarray(np.isfinite(scores.logits).all(axis=1))
    labels = split.labels.cpu().numpy()
    outcome = Outcomes({}, np.asarray(scores.predictions == labels), ~finite)
    outcome.soft_clean = np.asarray(soft_answers(scores) == labels)
    return outcome


def score(
    outcome: Outcomes,
    target: Target,
    halves: Halves,
    split: Split,
    attack: Attack,
    eps: float,
    standing: Mask,
) -> Found:
    """Ask the target about adversarial images, as floats and as delivered, and note who stood.

    Args:
        outcome: what is known of this target; it is added to.
        target: the engine that scores.
        halves: the images' changes, float16 `[n, C, H, W]`.
        split: clean images and labels.
        attack: that made them.
        eps: its radius.
        standing: bool `[n]`: images the attack was run on.

    Returns:
        the images, and which of them were answered wrongly.
    """
    images = split.images.cpu().numpy()
    floats = decode_fp16(images, halves)
    delivered = quantize_uint8(floats, images, eps, attack.norm)
    outcome.outside += count_norm_violations(floats, delivered, images, eps, attack.norm)
    outcome.scored += int(standing.sum())
    wrong = note(outcome, target.engine, floats, delivered, split, attack, eps, standing)
    return halves, delivered, *wrong


def note(
    outcome: Outcomes,
    engine: Scorer,
    floats: npt.NDArray[np.float32],
    delivered: npt.NDArray[np.uint8],
    split: Split,
    attack: Attack,
    eps: float,
    standing: Mask,
) -> tuple[Mask, Mask]:
    """Ask about both versions of the images and add to what is known of the target.

    Returns:
        which were answered wrongly, as floats and as delivered, bool `[n]`.
    """
    labels = split.labels.cpu().numpy()
    wrong = []
    for version, pixels in zip(VERSIONS, (floats, to_unit(delivered)), strict=True):
        scores = engine.run_all(pixels)
        outcome.invalid |= ~np.isfinite(scores.logits).all(axis=1)
        missed = (scores.predictions != labels) & standing
        key = (attack.name, eps, version)
        outcome.survived[key] = ~missed & outcome.survived.get(key, np.True_)
        soft = (soft_answers(scores) == labels) | ~standing
        outcome.soft[key] = soft & outcome.soft.get(key, np.True_)
        wrong.append(missed)
    ran = outcome.ran.get((attack.name, eps), np.False_)
    outcome.ran[attack.name, eps] = np.asarray(standing | ran)
    _keep_worst(outcome, (eps, attack.threat), delivered, wrong[1], standing)
    return wrong[0], wrong[1]


def to_unit(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return 8-bit images as the float32 in `[0,1]` that the engine takes."""
    return images.astype(np.float32) / np.float32(255)


def _keep_worst(
    outcome: Outcomes,
    key: tuple[float, str],
    delivered: npt.NDArray[np.uint8],
    wrong: Mask,
    standing: Mask,
) -> None:
    broken = outcome.broken.get(key)
    if broken is None:
        outcome.worst[key], outcome.broken[key] = delivered.copy(), wrong.copy()
        return
    fresh = ~broken & standing
    outcome.worst[key][fresh] = delivered[fresh]
    outcome.broken[key] = broken | wrong


def _merge(before: Found | None, found: Found) -> Found:
    """Keep, of each image and version, the first that broke it, else the last that was tried."""
    if before is None:
        return found
    halves, delivered = found[0].copy(), found[1].copy()
    halves[before[2]], delivered[before[3]] = before[0][before[2]], before[1][before[3]]
    return halves, delivered, before[2] | found[2], before[3] | found[3]


def _standing(
    attack: Attack, outcomes: Sequence[Outcomes], suite: Sequence[Attack], eps: float
) -> Mask:
    """Return the images an attack is run on: all, or those some target still gets right.

    Whatever has a figure of its own skips no image for what fell to another threat.
    """
    if not attack.standing_only:
        return np.ones(len(outcomes[0].clean), dtype=bool)
    others = [
        each
        for each in suite
        if each.name != attack.name and attack.threat in ("queries", each.threat)
    ]
    return np.asarray(np.any([outcome.robust(others, eps) for outcome in outcomes], axis=0))


def _crafted(
    attack: Attack,
    source: Source,
    scorer: Scorer,
    split: Split,
    eps: float,
    seed: tuple[int, int],
    standing: Mask,
) -> tuple[Halves, npt.NDArray[np.int64]]:
    """Return an attack's images as float16 changes and the queries spent, made or remembered."""
    members, weights = source
    key = [
        "craft",
        attack.to_json(),
        eps,
        list(seed),
        split.sha256,
        weights,
        [str(getattr(member, "compute", None)) for member in members[:1]],
        str(split.images.device.type),
        sha256(np.packbits(standing).tobytes()) if attack.standing_only else "all",
    ]

    def make() -> dict[str, npt.NDArray[Any]]:
        part = split.take(torch.from_numpy(np.flatnonzero(standing)).to(split.images.device))
        halves = np.zeros(tuple(split.images.shape), dtype=np.float16)
        queries = np.zeros(len(split), dtype=np.int64)
        if len(part):
            made, spent = _make(attack, members, scorer, part, eps, seed)
            halves[standing] = encode_fp16(made, part.images, eps, attack.norm)
            queries[standing] = spent
        return {"halves": halves, "queries": queries}

    # Sources that nothing tells apart are never remembered.
    known = bool(weights) or attack.source == "none"
    found = keep(key, make) if known else make()
    return found["halves"], found["queries"]


def _make(
    attack: Attack,
    members: Sequence[nn.Module],
    scorer: Scorer,
    part: Split,
    eps: float,
    seed: tuple[int, int],
) -> tuple[Tensor, npt.NDArray[np.int64] | int]:
    names = (seed[0], attack.name, str(eps), seed[1])
    if attack.kind == "square":
        clean = to_float(part.images).cpu().numpy()
        found = square(
            lambda pixels: scorer.run_all(pixels).logits,
            clean,
            part.labels.cpu().numpy(),
            eps=eps,
            queries=attack.queries,
            seed=derive(*names),
        )
        return torch.from_numpy(found.images), found.queries
    if attack.kind == "autoattack":
        images = to_float(part.images)
        return reference.autoattack(
            members, images, part.labels, eps=eps, norm=attack.norm, seed=derive(*names)
        ), 0
    return craft(attack, members, part, eps, *names), 0
