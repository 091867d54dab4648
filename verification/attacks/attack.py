"""One attack with all its parameters, and the adversarial images it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training import attacks as core
from training.data.splits import Split, to_float
from training.seeds import generator
from verification.attacks import losses, transforms
from verification.attacks.batches import in_batches
from verification.attacks.skip_gradient import skip_gradient

Threat = Literal["transfer", "queries", "white_box"]
Kind = Literal["noise", "gradient", "square", "autoattack"]
Loss = Literal["ce", "cw", "dlr", "reweighted", "none"]
Output = Literal["mean-logits", "mean-softmax", "logsumexp"]
LARGEST_HALF_DELTA = 127  # 8-bit steps that fit into int8


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack with all its parameters.

    Args:
        name: unique within the suite.
        threat: `transfer` needs nothing of the model, `queries` its answers, `white_box` its
            weights.
        source: whose gradients: a surrogate's name, `target` (the attacked model itself), or
            `none` for random noise.
        kind: `gradient` for all that follow one; Square and AutoAttack have code of their own.
        loss: what is raised.
        output: how the source's members are combined into the attacked output.
        norm: of the ball.
        steps: gradient steps; each has size `eps * step_share`.
        decay: of the accumulated gradient; None takes plain steps.
        restarts: random starts; an image must survive them all.
        random_start: begin at a random point of the ball, else at the clean image.
        diversity: probability of a random resize and padding at each step (DI2).
        skip_gamma: factor on the gradient of residual branches (SGM); 1 leaves them.
        variance_samples: neighbours for variance tuning (VMI); 0 for none.
        queries: most queries an image (Square).
        standing_only: skip images that have already fallen at this eps: to this threat, or with
            `queries`, which has no figure of its own, to any.
        control: whether an undefended control is attacked too, where the source is the target.
        only_eps: run at this radius alone.
        gate: the check this attack was added for; it counts like any other.
    """

    name: str
    threat: Threat
    source: str
    kind: Kind = "gradient"
    loss: Loss = "none"
    output: Output = "mean-logits"
    norm: core.Norm = "linf"
    steps: int = 0
    step_share: float = 0.2
    decay: float | None = None
    restarts: int = 1
    random_start: bool = True
    diversity: float = 0.0
    skip_gamma: float = 1.0
    variance_samples: int = 0
    queries: int = 0
    standing_only: bool = False
    control: bool = True
    only_eps: float | None = None
    gate: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return every parameter, for the report."""
        return asdict(self)

    @property
    def work(self) -> int:
        """Passes through the source, for progress."""
        return max(self.steps * (1 + self.variance_samples), self.queries, 1)


def craft(
    attack: Attack,
    members: Sequence[nn.Module],
    split: Split,
    eps: float,
    *seed: int | str,
) -> Tensor:
    """Return one adversarial version of every image, float32 `[N, C, H, W]`, inside the ball.

    Args:
        attack: of kind `noise` or `gradient`.
        members: the source, in evaluation mode, on the split's device.
        split: clean images and their labels.
        eps: radius, pixels in `[0,1]`.
        seed: names of the random draws; each image's draws depend on its batch alone.
    """

    def batch(part: Split, start: int) -> Tensor:
        draw = generator(*seed, start, device=part.images.device)
        return _craft_batch(attack, members, part, eps, draw)

    skips = attack.skip_gamma != 1
    with skip_gradient(members, attack.skip_gamma) if skips else contextlib.nullcontext():
        return torch.cat(in_batches(batch, split))


def _craft_batch(
    attack: Attack, members: Sequence[nn.Module], part: Split, eps: float, draw: torch.Generator
) -> Tensor:
    x0 = to_float(part.images)
    start = core.random_start(x0, eps, draw, attack.norm) if attack.random_start else x0
    if not attack.steps:
        return start
    loss = loss_of(attack, members, part.labels)
    if attack.diversity:
        loss = transforms.diverse_inputs(loss, draw, probability=attack.diversity)
    estimate: core.Estimate = core.gradient
    if attack.variance_samples:
        estimate = transforms.variance_tuned(
            eps, draw, samples=attack.variance_samples, norm=attack.norm
        )
    if attack.decay is not None:
        rule = core.momentum_rule(attack.decay, attack.norm)
    else:
        rule = core.sign_rule() if attack.norm == "linf" else transforms.l2_rule()
    return core.pgd_loop(
        loss,
        x0,
        eps=eps,
        step_size=eps * attack.step_share,
        steps=attack.steps,
        rule=rule,
        start=start,
        estimate=estimate,
        norm=attack.norm,
    )


def loss_of(attack: Attack, members: Sequence[nn.Module], labels: Tensor) -> core.Loss:
    """Return the per-image loss that `attack` raises on these members."""
    if attack.loss == "reweighted":
        return losses.member_reweighted(members, labels)
    outputs: dict[str, Callable[[Sequence[nn.Module]], core.Output]] = {
        "mean-logits": core.mean_logits_output,
        "mean-softmax": losses.mean_softmax_output,
        "logsumexp": losses.logsumexp_output,
    }
    chosen = {"ce": core.cross_entropy, "cw": losses.cw_margin, "dlr": losses.dlr}
    return chosen[attack.loss](outputs[attack.output](members), labels)
