"""Models whose gradients are known, and ways to score them where a test needs no file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dverge_serve.engine.outputs import Scores
from training.data.splits import Split
from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import Attack
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Outcomes
from verification.attacks.presets import Variant, suite
from verification.attacks.query_attack import QueryAttack
from verification.attacks.suite import run_suite
from verification.attacks.target import Target

EPS = 0.05  # 12.75 steps of 8 bits


class Linear(torch.nn.Module):
    """Class 1 where the mean pixel is above one half: gradients are known, so is the margin.

    Classes from the third on are never the answer.
    """

    def __init__(self, scale: float = 10.0, classes: int = 2) -> None:
        super().__init__()
        self.scale, self.classes = scale, classes

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x.mean((1, 2, 3)) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = self.score(x)
        others = [torch.full_like(score, -5.0 - each) for each in range(self.classes - 2)]
        return torch.stack([-score, score, *others], 1)


class Block(torch.nn.Module):
    """The identity as a residual block: half of the image each way."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = torch.nn.Identity()
        self.conv = torch.nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = self.shortcut(x) / 2 + self.conv(x)
        return whole


class Residual(Linear):
    """The same answers from a network with a residual branch."""

    def __init__(self, scale: float = 10.0, classes: int = 2) -> None:
        super().__init__(scale, classes)
        self.block = Block()

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return super().score(self.block(x))


class Saturated(Linear):
    """Right and certain answers in steps, without a gradient."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * torch.tanh(1e6 * super().score(x))


class Quantised(Linear):
    """A quantiser in front that no gradient passes."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return super().score((x * 85).round() / 85)


class Masked(Linear):
    """Right answers, and gradients of something else."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        honest = super().score(x)
        return honest.detach() + 1e-3 * (x[:, 0, 0, 0] - x[:, 0, 0, 0].detach())


class Softmax(Linear):
    """Probabilities where logits are expected."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(1)


class TorchEngine:
    """Scores torch modules; `broken` gives NaN, `noise` another answer each time."""

    def __init__(
        self, members: list[torch.nn.Module], broken: bool = False, noise: float = 0.0
    ) -> None:
        self.members, self.broken, self.noise = members, broken, noise
        self.draw = np.random.default_rng(0)

    def run_all(self, images: Any) -> Scores:
        with torch.no_grad():
            x = torch.from_numpy(np.ascontiguousarray(images))
            logits = torch.stack([member(x) for member in self.members], 1).numpy()
        logits = logits + self.noise * self.draw.normal(size=logits.shape).astype(np.float32)
        mean = logits.mean(1)
        return Scores(np.full_like(mean, np.nan) if self.broken else mean, logits)


def linear_split(values: list[int]) -> Split:
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    return Split(pixels.contiguous(), (pixels[:, 0, 0, 0] > 127).long())


VALUES = [110 + step for step in range(35)]


def shorter(attack: Attack, steps: int, queries: int) -> Attack:
    """Return the attack with at most so many steps or queries."""
    if isinstance(attack, AdaptivePGD):
        short = min(attack.steps, steps)
        return replace(attack, steps=short, nearest_steps=min(attack.nearest_steps, short))
    if isinstance(attack, GradientAttack):
        return replace(attack, steps=min(attack.steps, steps))
    if isinstance(attack, QueryAttack):
        return replace(attack, queries=min(attack.queries, queries))
    return attack


def attack_linear(
    target: torch.nn.Module, values: list[int], eps: float = EPS, broken: bool = False
) -> tuple[Outcomes, list[Attack]]:
    """Run `quick` on a model, with an honest linear surrogate."""
    chosen = suite(Variant(preset="quick", classes=2), ["surrogate"])
    outcomes = run_suite(
        chosen,
        {"surrogate": ([Linear()], "surrogate")},
        {"m": Target(TorchEngine([target], broken), [target])},
        linear_split(values),
        [eps],
        seed=0,
    )
    return outcomes["m"], chosen
