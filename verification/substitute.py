"""A stolen model: a substitute, two networks trained on the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dverge_serve.files import sha256
from dverge_serve.images import to_float as images_to_float
from training.config import Config
from training.data.splits import Split, normalisation, to_float
from training.methods.last_layers import fit, last_features
from training.models.build import build_members
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.pretrained import Start, last_layer
from training.parallel.threads import side_by_side
from training.pgd import cross_entropy, gradient
from training.seeds import derive, generator
from verification.attacks.batches import in_slices
from verification.attacks.outcomes import Pixels
from verification.attacks.query_attack import Answers
from verification.attacks.target import Scorer
from verification.gradients import ready
from verification.metrics.robust_accuracy import clean_scores

# 8-bit images [n, C, H, W] -> probabilities [n, classes]; one-hot where labels alone are told.
Ask = Callable[[Pixels], npt.NDArray[np.floating]]
MEMBERS = 2  # one for each of two cores, in the time of one
LARGEST_STEP = 0.2  # towards the boundary, in one round of queries
BATCH, RATE = 64, 3e-3
ROUND, LAST = (3, 20), (12, 200)  # epochs, and the steps that they are at least


@dataclass(frozen=True)
class Substitute:
    """A substitute.

    Args:
        members: in evaluation mode; their parameters take no gradient.
        weights: a hash of them.
        queries: that it took.
        answers: what it was trained on.
        seeds: held-out images that the queries began with.
        architecture: its name.
        gradients: that it took, each of one member on one image.
    """

    members: Sequence[Member]
    weights: str
    queries: int
    answers: Answers
    seeds: int
    architecture: str
    gradients: int

    def agreement(self, engine: Scorer, split: Split) -> float:
        """Return on which share of images it answers as the model does."""
        with torch.no_grad():
            answers = Ensemble(self.members)(to_float(split.images)).argmax(1).cpu().numpy()
        same = clean_scores(engine, split).predictions == answers
        return float(same.mean())

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "answers": self.answers,
            "queries": self.queries,
            "seeds": self.seeds,
            "members": len(self.members),
            "architecture": self.architecture,
            "weights_sha256": self.weights,
        }


def steal(
    ask: Ask,
    seeds: Split,
    config: Config,
    *,
    classes: int,
    queries: int,
    answers: Answers,
    seed: int,
) -> Substitute:
    """Train a substitute on a model's answers.

    The attacker has images that the model was not trained on, without labels, and knows the
    architecture. Where the model began from published weights, so does the substitute, and learns
    its last layer alone, which few answers are enough for. The first quarter of the queries are
    images of its own. Every later round doubles what was asked: half by steps towards the
    substitute's decision boundary, as Papernot et al. (2017, arXiv 1602.02697) augment by the
    Jacobian, half by mixing two images that were asked.

    Args:
        ask: the model; every image counts as a query.
        seeds: the attacker's images, on the device that trains.
        config: of the model: architecture and augmentation.
        classes: how many the model has.
        queries: in total.
        answers: what `ask` returns, for the report.
        seed: of every random draw.
    """
    names, device = (seed, "substitute", answers), seeds.device
    named = config.architecture
    architecture = named if isinstance(named, str) else named[0]
    alone = replace(
        config,
        method="standard",
        architecture=architecture,
        start=config.start if isinstance(config.start, str) else config.start[0],
        members=MEMBERS,
        seed=derive(*names) >> 31,
    )
    start = Start.read(alone)
    known = config.data if start else replace(config.data, mean=(), std=())
    members = build_members(alone, classes, *normalisation(known, seeds), "substitute")
    if start:
        start.put_into(members)
    members = [member.to(device) for member in members]
    ensemble = Ensemble(members)
    draw = generator(*names, "queries", device=device)
    first = torch.randperm(len(seeds), generator=draw, device=device)[: max(1, queries // 4)]
    asked = seeds.images[first]
    told = _told(ask, asked)
    trainings: list[_Training | _LastLayer] = [
        _LastLayer(member, device)
        if start and isinstance(last_layer(member)[1], nn.Linear)
        else _Training(member, generator(*names, index, device=device))
        for index, member in enumerate(members)
    ]
    gradients = 0
    while True:
        learn = methodcaller("run", asked, told, last=len(asked) >= queries)
        gradients += sum(side_by_side(learn, trainings, device))
        if len(asked) >= queries:
            break
        fresh = _fresh(ensemble.eval(), asked, told, draw)[: queries - len(asked)]
        gradients += len(asked) // 2 * MEMBERS
        asked, told = torch.cat([asked, fresh]), torch.cat([told, _told(ask, fresh)])
    weights = sha256(b"".join(t.cpu().numpy().tobytes() for t in ensemble.state_dict().values()))
    copies = [ready(member, device) for member in members]
    return Substitute(copies, weights, len(asked), answers, len(first), architecture, gradients)


def ask_engine(engine: Scorer, answers: Answers) -> Ask:
    """Return how an engine answers callers: by probabilities, or by labels alone."""

    def ask(images: Pixels) -> npt.NDArray[np.floating]:
        scores = engine.run_all(images_to_float(images))
        if answers == "scores":
            return scores.probabilities
        return np.eye(scores.logits.shape[1])[scores.predictions]

    return ask


def _told(ask: Ask, images: Tensor) -> Tensor:
    found = ask(images.cpu().numpy())
    return torch.from_numpy(np.asarray(found, np.float32)).to(images.device)


def _fresh(ensemble: Ensemble, asked: Tensor, told: Tensor, draw: torch.Generator) -> Tensor:
    """Return as many new 8-bit images as were asked, in random order."""
    count, device = len(asked), asked.device
    order = torch.randperm(count, generator=draw, device=device)
    x = to_float(asked[order])
    half = count // 2
    answers = told[order][:half].argmax(1)

    def climbs(part: slice) -> Tensor:
        return gradient(cross_entropy(ensemble, answers[part]), x[:half][part]).sign()

    toward = torch.cat([x[:0], *in_slices(climbs, half, x)])
    share = torch.rand((count, 1, 1, 1), generator=draw, device=device)
    stepped = x[:half] + LARGEST_STEP * share[:half] * toward
    other = x[torch.randperm(count, generator=draw, device=device)[half:]]
    mixed = x[half:] + share[half:] * (other - x[half:])
    made = torch.cat([stepped, mixed]).clamp(0, 1)
    made = made[torch.randperm(count, generator=draw, device=device)]
    return (made * 255).round().to(torch.uint8)


class _LastLayer:
    """Fitting of the last layer of one network to soft labels."""

    def __init__(self, member: Member, device: torch.device) -> None:
        self._member, self._before = member, ready(member, device)
        self._features: list[Tensor] = []

    def run(self, images: Tensor, told: Tensor, last: bool) -> int:
        """Fit it to all that was told; return how many gradients of the network that took: none.

        The layers before it stand still: features are computed once.
        """
        fresh = images[sum(map(len, self._features)) :]
        self._features.append(last_features(self._before, map(to_float, torch.split(fresh, BATCH))))
        fit(self._member, torch.cat(self._features), told)
        return 0


class _Training:
    """Training of one network on soft labels, round after round."""

    def __init__(self, member: Member, draw: torch.Generator) -> None:
        self._member, self._draw = member, draw
        self._optimizer = torch.optim.AdamW(member.parameters(), lr=RATE)

    def run(self, images: Tensor, told: Tensor, last: bool) -> int:
        """Train for some epochs, with a rate that falls to zero; return how many gradients."""
        epochs, steps = LAST if last else ROUND
        epochs = max(epochs, steps // -(-len(images) // BATCH))
        self._member.train()
        for epoch in range(epochs):
            for group in self._optimizer.param_groups:
                group["lr"] = RATE * (1 - epoch / epochs)
            order = torch.randperm(len(images), generator=self._draw, device=images.device)
            for rows in torch.split(order, BATCH):
                if len(rows) > 1:  # BatchNorm cannot normalise one image
                    loss = F.cross_entropy(self._member(to_float(images[rows])), told[rows])
                    self._optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    self._optimizer.step()
        return epochs * len(images)
