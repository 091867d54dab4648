"""Noise, and the attacks that follow a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dverge_serve.errors import UserError
from training import pgd
from training.models.ensemble import Ensemble
from training.seeds import generator
from verification.attacks import losses, transforms
from verification.attacks.attack import Attack, Crafted, Model
from verification.attacks.batches import in_slices
from verification.attacks.block_shuffle import block_shuffled
from verification.attacks.neighbourhood import (
    flatness_enhanced,
    norm_penalised,
    variance_tuned,
)
from verification.attacks.skip_gradient import skip_gradient

LossName = Literal["ce", "cw", "dlr", "reweighted"]
OwnLoss = Callable[[Tensor, Tensor], Tensor]  # outputs [N, classes], labels [N] -> loss [N]
OutputName = Literal["mean-logits", "mean-softmax", "logsumexp"]
LOSSES: dict[str, Callable[[pgd.Output, Tensor], pgd.Loss]] = {
    "ce": pgd.cross_entropy,
    "cw": losses.cw_margin,
    "dlr": losses.dlr,
}
OUTPUTS: dict[str, Callable[[Sequence[nn.Module]], pgd.Output]] = {
    "mean-logits": Ensemble,
    "mean-softmax": losses.mean_softmax_output,
    "logsumexp": losses.logsumexp_output,
}


@dataclass(frozen=True, kw_only=True)
class Noise(Attack, kind="noise"):
    """A uniformly random point of the ball around each image."""

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one noisy version of every image; see `Attack.run`."""

        def batch(part: slice) -> Tensor:
            draw = generator(*seed, part.start, device=images.device)
            return pgd.random_start(images[part], eps, draw, self.norm)

        return Crafted(torch.cat(in_slices(batch, len(images), images)))


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack, kind="gradient"):
    """PGD and its relatives: raise a loss along its gradient, inside the ball.

    Args:
        loss: the loss to raise: `ce`, `cw` (margin), `dlr`, `reweighted` (the members' margins, for
            which `output` means nothing), or a function of your own from outputs `[N, classes]`
            and labels `[N]` to one value an image `[N]`.
        output: how the members are combined into the outputs the loss sees.
        steps: gradient steps.
        rel_stepsize: size of a step, as a share of eps.
        momentum: decay of the accumulated gradient (MI-FGSM); None takes plain steps.
        random_start: begin at a random point of the ball, else at the clean image.
        diversity: probability of a random resize and padding at each step (DI2).
        skip_gamma: factor on the gradient of residual branches (SGM); 1 leaves them.
        variance_samples: neighbours for variance tuning (VMI); 0 for none. Of this and the next
            three only one can be used.
        penalty_samples: neighbours for the penalty on the gradient's norm (PGN).
        flat_samples: neighbours that follow their own gradients (MEF).
        shuffles: copies with shuffled and rotated blocks (BSR).
    """

    loss: LossName | OwnLoss = "ce"
    output: OutputName = "mean-logits"
    steps: int = 10
    rel_stepsize: float = 0.2
    momentum: float | None = None
    random_start: bool = True
    diversity: float = 0.0
    skip_gamma: float = 1.0
    variance_samples: int = 0
    penalty_samples: int = 0
    flat_samples: int = 0
    shuffles: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.loss):
            self.check("loss", get_args(LossName))
        self.check("output", OUTPUTS)
        if len(self._samples) > 1:
            raise UserError(
                f"the attack '{self.name}' has {' and '.join(self._samples)}", "one of them"
            )
        if self.source == "none":
            raise UserError(f"the attack '{self.name}' has no source", "a model with gradients")

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image; see `Attack.run`.

        Each image's random draws depend on its batch alone.
        """
        members = members_of(model)

        def batch(part: slice) -> Tensor:
            draw = generator(*seed, part.start, device=images.device)
            return self._batch(members, images[part], labels[part], eps, draw)

        skips = self.skip_gamma != 1
        with skip_gradient(members, self.skip_gamma) if skips else contextlib.nullcontext():
            return Crafted(torch.cat(in_slices(batch, len(images), images)))

    def loss_on(self, members: Sequence[nn.Module], labels: Tensor) -> pgd.Loss:
        """Return the per-image loss to raise on these members, a function of the images."""
        loss = self.loss
        if loss == "reweighted":
            return losses.member_reweighted(members, labels)
        output = OUTPUTS[self.output](members)
        if callable(loss):
            return lambda x: loss(output(x), labels)
        return LOSSES[loss](output, labels)

    @property
    def cacheable(self) -> bool:
        """Whether the JSON form says all that shapes the images: not with a loss of one's own."""
        return super().cacheable and not callable(self.loss)

    @property
    def work(self) -> int:
        """Passes through the source, for progress."""
        a_step = 1
        if self._samples:
            ((name, count),) = self._samples.items()
            a_step = {"variance_samples": 1 + count, "penalty_samples": 2 * count}.get(name, count)
        return max(self.steps * a_step, 1)

    def to_json(self) -> dict[str, Any]:
        """Return every parameter, for the report; of a loss of one's own its name."""
        named = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return super().to_json() | {"loss": named if callable(self.loss) else self.loss}

    @property
    def _samples(self) -> dict[str, int]:
        """How many samples a step's gradient is averaged over, by the name of the setting."""
        names = ("variance_samples", "penalty_samples", "flat_samples", "shuffles")
        return {name: count for name in names if (count := getattr(self, name))}

    def _estimate(self, eps: float, draw: torch.Generator) -> pgd.Estimate:
        if self.variance_samples:
            return variance_tuned(eps, draw, samples=self.variance_samples, norm=self.norm)
        if self.penalty_samples:
            step_size, samples = eps * self.rel_stepsize, self.penalty_samples
            return norm_penalised(eps, draw, step_size=step_size, samples=samples, norm=self.norm)
        if self.flat_samples:
            return flatness_enhanced(eps, draw, samples=self.flat_samples, norm=self.norm)
        return block_shuffled(draw, copies=self.shuffles) if self.shuffles else pgd.gradient

    def _batch(
        self,
        members: Sequence[nn.Module],
        x0: Tensor,
        labels: Tensor,
        eps: float,
        draw: torch.Generator,
    ) -> Tensor:
        loss = self.loss_on(members, labels)
        start = self._start(x0, eps, draw)
        if self.diversity:
            loss = transforms.diverse_inputs(loss, draw, probability=self.diversity)
        return self._climb(loss, x0, eps, start, self._estimate(eps, draw))

    def _start(self, x0: Tensor, eps: float, draw: torch.Generator) -> Tensor:
        return pgd.random_start(x0, eps, draw, self.norm) if self.random_start else x0

    def _climb(
        self, loss: pgd.Loss, x0: Tensor, eps: float, start: Tensor, estimate: pgd.Estimate
    ) -> Tensor:
        rule = None if self.momentum is None else pgd.momentum_rule(self.momentum, self.norm)
        return pgd.pgd_loop(
            loss,
            x0,
            eps=eps,
            step_size=eps * self.rel_stepsize,
            steps=self.steps,
            rule=rule,
            start=start,
            estimate=estimate,
            norm=self.norm,
        )


def members_of(model: Model) -> list[nn.Module]:
    """Return an ensemble's members; any other module counts as its own only member.

    Raises:
        TypeError: a plain function has no gradients to follow.
    """
    if isinstance(model, Ensemble):
        return list(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"a gradient attack follows a torch.nn.Module, not {type(model).__name__}")
    return [model]
