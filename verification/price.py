"""The price of a verification: gradient evaluations, and seconds, before anything is begun."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dverge_serve.progress import duration, say
from training.budget import gradient_evaluations
from training.config import Config
from training.data.splits import Split, TrainingData, to_float
from training.estimate import estimate
from training.models.ensemble import Ensemble
from training.trainer import prepare
from verification.attacks.attack import Attack
from verification.attacks.batches import LARGEST
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.rounds import later_rounds
from verification.attacks.suite import LATER, SMALLER
from verification.attacks.target import Scorer
from verification.gradients import ready
from verification.surrogate import Surrogate
from verification.surrogates import SurrogateSet

FEW = 8  # images that a gradient is timed on
CHECKS = 65  # gradients of the model on each image, for the gates and the other measurements
LONG_S = 0.02  # for a gradient of one image


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a verification costs, in gradients of one network on one image.

    Args:
        surrogates: to train all of them.
        attacks: the substitute among them; before they ran, an estimate.
        checks: gates and other measurements, the same.
        training: what the model's own training took; None for a foreign classifier.
    """

    surrogates: int
    attacks: int
    checks: int
    training: int | None

    @property
    def whole(self) -> int:
        """All of the verification's gradients."""
        return self.surrogates + self.attacks + self.checks

    def __str__(self) -> str:
        if self.training is None:
            return f"about {self.whole / 1e6:.2g} million gradients"
        share = self.whole / self.training
        return f"about {share:.2g} times the gradients of the model's own training"

    def to_json(self) -> dict[str, int | None]:
        """Return the figures as the report has them."""
        return {
            "surrogates": self.surrogates,
            "attacks": self.attacks,
            "checks": self.checks,
            "model_training": self.training,
        }


def gradient_cost(
    suite: Sequence[Attack], source: Mapping[str, float], images: int, radii: int
) -> float:
    """Estimate what all gradients of a suite cost, counted or timed.

    Exact for attacks that leave out no image. Answers of the model are no gradients and cost
    nothing here.

    Args:
        suite: the attacks.
        source: what one gradient of one image costs on each source: a surrogate's name, `target`,
            or `control` for the undefended model that white-box attacks run on too.
        images: how many are attacked.
        radii: at how many each attack runs.
    """
    total = 0.0
    later = later_rounds(suite)
    for attack in suite:
        if attack.asks or attack in later:
            continue
        one, starts = source.get(attack.source, 0.0), float(attack.restarts)
        if attack.source == "target":
            one += source.get("control", 0.0) * attack.control
            starts = 1 + LATER * (attack.restarts - 1)
        times = 1.0 if attack.only_eps is not None else radii
        if attack.skip_broken:
            times = attack.nearest * (1 + SMALLER * (times > 1))
        attacked = min(attack.sample or images, images)
        total += attack.work * starts * times * one * attacked
    return total


def answer_count(suite: Sequence[Attack], images: int, radii: int) -> int:
    """Estimate how many answers of a model a suite asks for, queries and scoring together.

    Args:
        suite: the attacks.
        images: how many are attacked.
        radii: at how many each attack runs.
    """
    total = 0.0
    for attack in suite:
        times = 1 if attack.only_eps is not None else radii
        attacked = min(attack.sample or images, images) * attack.nearest
        scored = 2 * (1 + attack.control) * times  # in both versions; on the control, too
        asked = attack.work * (1 if attack.one_search else times) if attack.asks else 0
        total += attacked * (asked + scored)
    return round(total)


def price(
    suite: Sequence[Attack],
    sizes: Mapping[str, int],
    configs: Sequence[Config],
    model: Config | None,
    *,
    train_images: int,
    images: int,
    radii: int,
    skipped: Collection[str] = (),
) -> Price:
    """Count the gradients of a verification.

    Args:
        suite: the attacks.
        sizes: how many networks each source has, see `gradient_cost`.
        configs: of the surrogates that belong to it, cached or not.
        model: how the model was trained, if that is known.
        skipped: stages of its training that starting weights stood for.
        train_images, images: how many are trained on and attacked.
        radii: at how many each attack runs.
    """

    def trained(config: Config, skipped: Collection[str] = ()) -> int:
        return sum(gradient_evaluations(config, train_images, skipped).values())

    return Price(
        surrogates=sum(map(trained, configs)),
        attacks=round(gradient_cost(suite, sizes, images, radii)),
        checks=CHECKS * images * sizes.get("target", 0),
        training=None if model is None else trained(model, skipped),
    )


def forecast(
    suite: Sequence[Attack],
    made: Sequence[Surrogate],
    sets: Sequence[SurrogateSet],
    members: Sequence[nn.Module],
    engine: Scorer,
    data: TrainingData,
    split: Split,
    radii: int,
    device: torch.device,
) -> str:
    """Time a few steps and return a line that says what will take how long.

    Args:
        suite: the attacks.
        made: surrogates that are there.
        sets: surrogates to train; those in the cache take no time.
        members: the model's own networks; none where they are not known.
        engine: gives the model's answers.
        data: for training.
        split: the test images.
        radii: at how many each attack runs.
        device: where all of it runs.
    """
    say("measuring what all this will take")
    networks, training = 0, 0.0
    seconds = {each.name: _seconds(each.members, split) for each in made}
    for each in sets:
        if not (each.folder(data) / "checkpoint.json").is_file():
            networks += each.config.members
            training += sum(estimate(each.config, device, data)["seconds"].values())
        drawn, _ = prepare(each.config, data, device)
        ensemble = [ready(member, device, lowered=True) for member in drawn]
        alone = [_seconds([member], split) for member in ensemble]
        seconds |= {
            name: sum(alone[index] for index in indices) for name, indices in each.parts.items()
        }
    if members:
        seconds["target"] = seconds["control"] = _seconds(members, split)
    told = "surrogates: none to train"
    if networks:
        epochs = max(each.config.standard.epochs for each in sets)
        told = f"surrogates: {networks} networks to train for {epochs} epochs, "
        told += f"about {duration(training)}"
    attacks = gradient_cost(suite, seconds, len(split), radii)
    attacks += answer_count(suite, len(split), radii) * _answer_seconds(engine, split)
    checks = CHECKS * len(split) * seconds.get("target", 0.0)
    return (
        f"{told}; attacks: {len(suite)} at {radii} radii on {len(split)} images, "
        f"about {duration(attacks)}; gates and other measurements: about {duration(checks)}"
    )


def _answer_seconds(engine: Scorer, split: Split) -> float:
    """Return the seconds that the model's answer to one image takes."""
    images = to_float(split.images[:FEW]).cpu().numpy()
    engine.run_all(images)  # prepares what later times use
    begun = time.monotonic()
    engine.run_all(images)
    return (time.monotonic() - begun) / len(images)


def _seconds(members: Sequence[nn.Module], split: Split) -> float:
    """Return the seconds that one gradient of one image takes on these networks."""
    attack = GradientAttack(name="timed", threat="transfer", source="timed", steps=1)
    model = Ensemble(members).eval()

    def timed(count: int) -> float:
        part = split.take(slice(0, count))
        begun = time.monotonic()
        float(attack.run(model, to_float(part.images), part.labels, 0.1, 0).images.sum())
        return (time.monotonic() - begun) / len(part)

    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each thread of the suite
    try:
        timed(FEW)  # prepares what later times use
        one = timed(FEW)
        if one < LONG_S:  # small images are worked on in whole batches
            one = timed(LARGEST["cpu"])
    finally:
        torch.set_num_threads(cores)
    batches = -(-len(split) // LARGEST["cpu"])
    return one / (min(batches, cores) if split.images.device.type == "cpu" else 1)
