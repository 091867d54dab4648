"""The published procedure, slowly and literally: the oracle for members and DVERGE.

Written from the paper's equations and the recipe's description alone. Nothing is shared with the
product but the names of the tensors: convolution comes from torch, BatchNorm, SGD, the distillation
steps and PGD's are spelt out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
BN_MOMENTUM = 0.1
DEPTH = 8


class Network:
    """A ResNet-8 as a dictionary of tensors, named as in the product's `state_dict`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.training = True

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.endswith((".weight", ".bias"))
        }

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"]
        if self.training:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            batch_mean = x.sum((0, 2, 3)) / count
            batch_variance = ((x - batch_mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
            unbiased = batch_variance.detach() * count / (count - 1)
            self.tensors[f"{name}.running_mean"] = (
                1 - BN_MOMENTUM
            ) * mean + BN_MOMENTUM * batch_mean.detach()
            self.tensors[f"{name}.running_var"] = (
                1 - BN_MOMENTUM
            ) * variance + BN_MOMENTUM * unbiased
            self.tensors[f"{name}.num_batches_tracked"] += 1
            mean, variance = batch_mean, batch_variance
        normal = (x - mean[:, None, None]) / (variance[:, None, None] + EPSILON).sqrt()
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return normal * weight[:, None, None] + bias[:, None, None]

    def features(self, images: Tensor, layer: int) -> Tensor:
        """Return the output of `layer` (1..8) before its ReLU, computing nothing else."""
        x = (images - self.tensors["mean"]) / self.tensors["std"]
        one = self.norm("stages.0.norm", self.conv("stages.0.conv", x))
        if layer == 1:
            return one
        block = F.relu(one)
        two = self.norm("stages.1.norm", self.conv("stages.1.conv", block))
        if layer == 2:
            return two
        three = self.norm("stages.2.norm", self.conv("stages.2.conv", F.relu(two))) + block
        if layer == 3:
            return three
        block = F.relu(three)
        four = self.norm("stages.3.norm", self.conv("stages.3.conv", block, stride=2))
        if layer == 4:
            return four
        five = self.norm("stages.4.norm", self.conv("stages.4.conv", F.relu(four)))
        five = five + self.norm(
            "stages.4.shortcut.1", self.conv("stages.4.shortcut.0", block, stride=2)
        )
        if layer == 5:
            return five
        block = F.relu(five)
        six = self.norm("stages.5.norm", self.conv("stages.5.conv", block, stride=2))
        if layer == 6:
            return six
        seven = self.norm("stages.6.norm", self.conv("stages.6.conv", F.relu(six)))
        seven = seven + self.norm(
            "stages.6.shortcut.1", self.conv("stages.6.shortcut.0", block, stride=2)
        )
        if layer == 7:
            return seven
        pooled = F.relu(seven).mean((2, 3))
        weight, bias = self.tensors["stages.7.linear.weight"], self.tensors["stages.7.linear.bias"]
        return pooled @ weight.T + bias


def distill(
    network: Network,
    source: Tensor,
    target: Tensor,
    *,
    layer: int,
    eps: float,
    step_size: float,
    steps: int,
    decay: float,
    batchnorm: Literal["batch", "running"],
) -> Tensor:
    """Minimise `|| f_l(z) - f_l(x_t) ||^2` over the ball around `source` (eq. 1)."""
    network.training = batchnorm == "batch"
    z = source.clone()
    accumulated = torch.zeros_like(source)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        seen = network.features(z, layer)
        with torch.no_grad():
            wanted = network.features(target, layer)
        (gradient,) = torch.autograd.grad(((seen - wanted) ** 2).sum(), z)
        for image in range(len(z)):
            size = sum(abs(value) for value in gradient[image].flatten().tolist())
            accumulated[image] = decay * accumulated[image] + gradient[image] / size
        z = z.detach() - step_size * accumulated.sign()
        z = torch.where(z > source + eps, source + eps, z)
        z = torch.where(z < source - eps, source - eps, z)
        z = torch.where(z > 1, torch.ones_like(z), z)
        z = torch.where(z < 0, torch.zeros_like(z), z)
    return z


def cross_entropies(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image's logits with its label."""
    logits = network.features(images, DEPTH)
    return logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]


class Descent:
    """SGD with momentum and weight decay for one network."""

    def __init__(self, network: Network, lr: float, momentum: float, weight_decay: float) -> None:
        self.network, self.lr = network, lr
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity: dict[str, Tensor] = {}

    def step(self, batches: Sequence[tuple[Tensor, float]], labels: Tensor) -> float:
        """Take one step on the weighted sum of several batches' mean cross-entropies."""
        self.network.training = True
        leaves = {
            name: tensor.clone().requires_grad_()
            for name, tensor in self.network.parameters.items()
        }
        self.network.tensors |= leaves
        loss = torch.zeros((), dtype=batches[0][0].dtype)
        for images, weight in batches:
            loss = loss + weight * cross_entropies(self.network, images, labels).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            decayed = gradient + self.weight_decay * leaf.detach()
            if name in self.velocity:
                self.velocity[name] = self.momentum * self.velocity[name] + decayed
            else:
                self.velocity[name] = decayed
            self.network.tensors[name] = leaf.detach() - self.lr * self.velocity[name]
        return float(loss.detach())


def adversarial(
    network: Network,
    source: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Return PGD examples (Madry et al., 2018) made on `network` with running statistics.

    `noise` is uniform in `[0,1]`, shaped like `source`: the random start within the ball.
    """
    network.training = False
    x = source + (2 * noise - 1) * eps
    x = torch.where(x > 1, torch.ones_like(x), x)
    x = torch.where(x < 0, torch.zeros_like(x), x)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropies(network, x, labels).sum(), x)
        x = x.detach() + step_size * gradient.sign()
        x = torch.where(x > source + eps, source + eps, x)
        x = torch.where(x < source - eps, source - eps, x)
        x = torch.where(x > 1, torch.ones_like(x), x)
        x = torch.where(x < 0, torch.zeros_like(x), x)
    return x


@dataclass(frozen=True)
class Images:
    """What the members of one step made, in their order."""

    distilled: list[Tensor]
    adversarial: list[Tensor]  # empty without +AdvT


def dverge_step(
    descents: Sequence[Descent],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    eps: float,
    step_size: float,
    steps: int,
    decay: float,
    batchnorm: Literal["batch", "running"],
    weight: float = 1.0,
    pgd: dict[str, Any] | None = None,
    noises: Sequence[Tensor] = (),
) -> tuple[list[float], Images]:
    """Make all images, then let each member learn from the others' (eq. 3).

    With `pgd` (eps, step size and steps), and the noise each member's PGD starts from, it learns
    from its own adversarial images too: `weight * the sum + CE(f_i(x_adv), y)` (section 4.4).
    """
    distilled = [
        distill(
            descent.network,
            source,
            target,
            layer=layer,
            eps=eps,
            step_size=step_size,
            steps=steps,
            decay=decay,
            batchnorm=batchnorm,
        )
        for descent in descents
    ]
    attacked = [
        adversarial(descent.network, source, labels, noise, **pgd or {})
        for descent, noise in zip(descents, noises, strict=bool(pgd))
    ]
    losses = []
    for i, descent in enumerate(descents):
        others = [(images, weight) for j, images in enumerate(distilled) if j != i]
        own = [(attacked[i], 1.0)] if pgd else []
        losses.append(descent.step([*others, *own], labels))
    return losses, Images(distilled, attacked)
