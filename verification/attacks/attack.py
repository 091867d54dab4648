"""One attack with all its parameters, and the adversarial images it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training import attacks as core
from training.data.splits import Split, to_float
from training.seeds import generator
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
        loss = core.diverse_inputs(loss, draw, probability=attack.diversity)
    estimate: core.Estimate = core.gradient
    if attack.variance_samples:
        estimate = core.variance_tuned(eps, draw, samples=attack.variance_samples, norm=attack.norm)
    if attack.decay is not None:
        rule = core.momentum_rule(attack.decay, attack.norm)
    else:
        rule = core.sign_rule() if attack.norm == "linf" else core.l2_rule()
    return core.ascend(
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
        return core.member_reweighted(members, labels)
    outputs: dict[str, Callable[[Sequence[nn.Module]], core.Output]] = {
        "mean-logits": core.mean_logits_output,
        "mean-softmax": core.mean_softmax_output,
        "logsumexp": core.logsumexp_output,
    }
    losses = {"ce": core.cross_entropy, "cw": core.cw_margin, "dlr": core.dlr}
    return losses[attack.loss](outputs[attack.output](members), labels)


def half_deltas(
    adversarial: Tensor, images: Tensor, eps: float, norm: core.Norm
) -> npt.NDArray[np.float16]:
    """Return what is kept of float adversarial images: the change, in float16, inside the ball.

    Images are rounded to what is kept before they are scored, so that a replay scores the same.

    Args:
        adversarial: float32 `[N, C, H, W]`.
        images: the clean ones, uint8.
        eps: the ball's radius; a change that rounding would push out is rounded inward.
        norm: of the ball.
    """
    clean = images.cpu().numpy().astype(np.float32) / np.float32(255)
    exact = adversarial.cpu().numpy() - clean
    halves = exact.astype(np.float16)
    over = np.abs(halves.astype(np.float32)) > (eps if norm == "linf" else np.abs(exact))
    halves[over] = np.nextafter(halves[over], np.float16(0))
    return np.asarray(halves)


def apply_halves(
    images: npt.NDArray[np.uint8], halves: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """Return the float32 images `[N, C, H, W]` in `[0,1]` that `half_deltas` stands for."""
    clean = images.astype(np.float32) / np.float32(255)
    return np.asarray(np.clip(clean + halves.astype(np.float32), 0, 1))


def deliver(
    adversarial: npt.NDArray[np.float32],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: core.Norm = "linf",
) -> npt.NDArray[np.uint8]:
    """Round adversarial images to the 8 bits a server receives, inside the ball.

    Args:
        adversarial: float32 `[N, C, H, W]`.
        images: the clean ones.
        eps: the ball; the largest whole Linf step inside it is `floor(255 eps)`.
        norm: of the ball; in L2 every change is rounded towards zero.
    """
    clean = images.astype(np.int16)
    change = adversarial.astype(np.float64) * 255 - clean
    if norm == "linf":
        reach = whole_steps(eps)
        change = np.clip(np.rint(change), -reach, reach)
    else:
        change = np.trunc(change + np.sign(change) * 1e-4)  # 12 must not become 11.99999
    return np.asarray(np.clip(clean + change, 0, 255).astype(np.uint8))


def whole_steps(eps: float) -> int:
    """Return how many 8-bit steps fit into eps; 0.2 is 51, whatever the floating point says."""
    return int(eps * 255 + 1e-9)


def outside(
    floats: npt.NDArray[np.float32],
    delivered: npt.NDArray[np.uint8],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: core.Norm = "linf",
) -> int:
    """Return how many images left the ball or the box, in either version."""
    clean = images.astype(np.float32) / np.float32(255)
    axes = (1, 2, 3)
    steps = np.abs(delivered.astype(np.float64) - images)
    if norm == "linf":
        bad = (np.abs(floats - clean) > eps + 1e-6).any(axis=axes)
        bad |= (steps > eps * 255 + 1e-6).any(axis=axes)
    else:
        bad = np.sqrt(np.square(floats.astype(np.float64) - clean).sum(axis=axes)) > eps + 1e-4
        bad |= np.sqrt(np.square(steps).sum(axis=axes)) > eps * 255 + 0.03
    bad |= ~((floats >= 0) & (floats <= 1)).all(axis=axes)
    return int(bad.sum())
