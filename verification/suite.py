"""The attack suite: which attacks, made from what, and who survived each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dverge_serve.engine import Engine
from dverge_serve.progress import Progress
from training import attacks as core
from training.data import Split, to_float
from training.seeds import generator
from verification.statistics import Mask

Threat = Literal["transfer", "white_box"]
Loss = Literal["ce", "cw", "none"]
Output = Literal["mean-logits", "mean-softmax"]
VERSIONS = ("float", "delivered")
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack with all its parameters.

    Args:
        name: unique within the suite.
        threat: `transfer` needs no access to the model; `white_box` has its weights.
        source: whose gradients: a surrogate's name, `target` (the attacked model itself), or
            `none` for random noise.
        loss: what is raised.
        output: how the source's members are combined into the attacked output.
        steps: gradient steps; each has size `eps * step_share`.
        decay: of the accumulated gradient; None takes plain sign steps.
        restarts: random starts; an image must survive them all.
    """

    name: str
    threat: Threat
    source: str
    loss: Loss = "none"
    output: Output = "mean-logits"
    steps: int = 0
    step_share: float = 0.2
    decay: float | None = None
    restarts: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return every parameter, for the report."""
        return asdict(self)


def quick_suite(surrogates: Sequence[str]) -> list[Attack]:
    """Return the preset `quick`: the honest core of the paper's protocol (section 4.2).

    Momentum PGD from every surrogate with both losses; white-box PGD on both ways of combining
    the members, because a saturated softmax hides the gradient; noise as the baseline.
    """
    suite = [Attack(name="noise", threat="transfer", source="none")]
    losses: tuple[Loss, ...] = ("ce", "cw")
    for surrogate in surrogates:
        for loss in losses:
            suite.append(
                Attack(
                    name=f"mpgd-{loss} from {surrogate}",
                    threat="transfer",
                    source=surrogate,
                    loss=loss,
                    steps=20,
                    decay=1.0,
                    restarts=2,
                )
            )
    forms: tuple[tuple[Loss, Output], ...] = (
        ("ce", "mean-logits"),
        ("ce", "mean-softmax"),
        ("cw", "mean-logits"),
    )
    for loss, output in forms:
        suite.append(
            Attack(
                name=f"pgd-{loss} on {output}",
                threat="white_box",
                source="target",
                loss=loss,
                output=output,
                steps=20,
                restarts=2,
            )
        )
    return suite


@dataclass(frozen=True)
class Target:
    """A model under attack: the engine that scores it, and its weights where we have them."""

    engine: Engine
    members: Sequence[nn.Module] | None


@dataclass
class Outcomes:
    """Who survived what, for one target.

    `survived[attack, eps, version]` is bool `[n]`: every restart's answer was still the label.
    `invalid` marks images with an output that was not finite at any time.
    """

    survived: dict[tuple[str, float, str], Mask]
    clean: Mask
    invalid: Mask
    outside: int = 0  # adversarial images outside their ball or box: a bug of the harness
    hardest: dict[float, Tensor] = field(default_factory=dict)  # last white-box images, per eps

    def robust(self, attacks: Sequence[Attack], eps: float, versions: Sequence[str]) -> Mask:
        """Return which images are right when clean and survive all these attacks, `[n]`."""
        robust = self.clean & ~self.invalid
        for attack in attacks:
            for version in versions:
                robust = robust & self.survived[attack.name, eps, version]
        return robust


def run_suite(
    suite: Sequence[Attack],
    sources: Mapping[str, Sequence[nn.Module]],
    targets: Mapping[str, Target],
    split: Split,
    eps_grid: Sequence[float],
    *,
    seed: int,
) -> dict[str, Outcomes]:
    """Attack every target with every attack at every eps.

    Transfer images are crafted once and scored on all targets: the same attack for each.

    Args:
        suite: the attacks.
        sources: surrogates by name, in evaluation mode, on the split's device.
        targets: by name.
        split: test images.
        eps_grid: Linf radii.
        seed: of the random starts.
    """
    labels = split.labels.cpu().numpy()
    outcomes = {name: _start(target.engine, split, labels) for name, target in targets.items()}
    jobs: list[tuple[Attack, list[str], Sequence[nn.Module]]] = []
    for attack in suite:
        if attack.source == "target":
            jobs += [(attack, [name], t.members) for name, t in targets.items() if t.members]
        else:
            jobs.append((attack, list(targets), sources.get(attack.source, ())))
    work = sum(max(attack.steps, 1) * attack.restarts for attack, _, _ in jobs) * len(eps_grid)
    with Progress(f"attacking, {len(split)} images", work) as progress:
        for attack, names, members in jobs:
            for eps in eps_grid:
                for restart in range(attack.restarts):
                    draw = generator(
                        seed, attack.name, str(eps), restart, device=split.images.device
                    )
                    adversarial = craft(attack, members, split, eps, draw)
                    for name in names:
                        _score(
                            outcomes[name], targets[name].engine, adversarial, split, attack, eps
                        )
                    progress.advance(max(attack.steps, 1), f"{attack.name}, eps {eps:g}")
    return outcomes


def craft(
    attack: Attack, members: Sequence[nn.Module], split: Split, eps: float, draw: torch.Generator
) -> Tensor:
    """Return one adversarial version of every image, float32 `[N, C, H, W]`, inside the ball."""
    made = []
    for start in range(0, len(split), BATCH):
        part = split.take(slice(start, start + BATCH))
        x0 = to_float(part.images)
        x = core.random_start(x0, eps, draw)
        if attack.steps:
            x = core.ascend(
                loss_of(attack, members, part.labels),
                x0,
                eps=eps,
                step_size=eps * attack.step_share,
                steps=attack.steps,
                rule=core.sign_rule() if attack.decay is None else core.momentum_rule(attack.decay),
                start=x,
            )
        made.append(x)
    return torch.cat(made)


def loss_of(attack: Attack, members: Sequence[nn.Module], labels: Tensor) -> core.Loss:
    """Return the per-image loss that `attack` raises on these members."""
    outputs: dict[str, Callable[[Sequence[nn.Module]], core.Output]] = {
        "mean-logits": core.mean_logits_output,
        "mean-softmax": core.mean_softmax_output,
    }
    losses = {"ce": core.cross_entropy, "cw": core.cw_margin}
    return losses[attack.loss](outputs[attack.output](members), labels)


def deliver(adversarial: Tensor, images: Tensor, eps: float) -> npt.NDArray[np.uint8]:
    """Round adversarial images to the 8 bits a server receives, inside the ball.

    Args:
        adversarial: float `[N, C, H, W]`.
        images: the clean ones, uint8.
        eps: the ball; the largest whole step inside it is `floor(255 eps)`.
    """
    clean = images.cpu().numpy().astype(np.int16)
    reach = whole_steps(eps)
    delta = np.rint(adversarial.cpu().numpy().astype(np.float64) * 255 - clean)
    return np.asarray(np.clip(clean + np.clip(delta, -reach, reach), 0, 255).astype(np.uint8))


def whole_steps(eps: float) -> int:
    """Return how many 8-bit steps fit into eps; 0.2 is 51, whatever the floating point says."""
    return int(eps * 255 + 1e-9)


def _start(engine: Engine, split: Split, labels: npt.NDArray[np.int64]) -> Outcomes:
    scores = engine.run_all(to_float(split.images).cpu().numpy())
    finite: Mask = np.asarray(np.isfinite(scores.logits).all(axis=1))
    return Outcomes({}, np.asarray(scores.predictions == labels), ~finite)


def _score(
    outcome: Outcomes, engine: Engine, adversarial: Tensor, split: Split, attack: Attack, eps: float
) -> None:
    labels = split.labels.cpu().numpy()
    floats = adversarial.cpu().numpy()
    delivered = deliver(adversarial, split.images, eps)
    outcome.outside += _outside(floats, delivered, split.images.cpu().numpy(), eps)
    versions = {"float": floats, "delivered": delivered.astype(np.float32) / np.float32(255)}
    for version, pixels in versions.items():
        scores = engine.run_all(pixels)
        outcome.invalid |= ~np.isfinite(scores.logits).all(axis=1)
        key = (attack.name, eps, version)
        survived = scores.predictions == labels
        outcome.survived[key] = survived & outcome.survived.get(key, np.True_)
    if attack.source == "target":
        outcome.hardest[eps] = adversarial


def _outside(
    floats: npt.NDArray[np.float32],
    delivered: npt.NDArray[np.uint8],
    images: npt.NDArray[np.uint8],
    eps: float,
) -> int:
    """Return how many images left the ball or the box, in either version."""
    clean = images.astype(np.float32) / np.float32(255)
    axes = (1, 2, 3)
    bad = (np.abs(floats - clean) > eps + 1e-6).any(axis=axes)
    bad |= ~((floats >= 0) & (floats <= 1)).all(axis=axes)
    steps = np.abs(delivered.astype(np.int16) - images.astype(np.int16))
    bad |= (steps > eps * 255 + 1e-6).any(axis=axes)
    return int(bad.sum())
