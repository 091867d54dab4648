"""False defences: models that look robust to attacks that follow their gradients.

Each stands in front of, or beside, an ordinary small network on the digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.splits import Split, load_test, load_training, to_float
from training.recipe import load_recipe

LEVELS = torch.tensor([round(255 * step / 16) for step in range(17)]) / 255


class Perceptron(nn.Module):
    """A network with one hidden layer, from images `[N, 1, 8, 8]` to logits `[N, 10]`."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(64, 64), nn.Linear(64, 10), activation

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.activation(self.first(x.flatten(1))))
        return logits


@functools.cache
def training() -> Split:
    """Return the digits to train on."""
    train = load_training(load_recipe("digits").data).train
    assert isinstance(train, Split)
    return train


@functools.cache
def trained(seed: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> Perceptron:
    """Return a network trained on the digits, in a second; right on about 96% of the others."""
    images, labels = to_float(training().images), training().labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Perceptron(activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval().requires_grad_(False)


def fine_steps(inner: nn.Module, x: Tensor) -> Tensor:
    """Round the image's cosine transform to steps of 1/8, smoothly: almost flat, then steep."""
    at = torch.arange(8.0)
    waves = torch.cos(torch.pi * (2 * at + 1) * at[:, None] / 16) / 2
    waves[0] /= 2**0.5
    turn = 16 * torch.pi
    found = waves @ x @ waves.T
    for _ in range(3):
        found = found - 0.999 * torch.sin(turn * found) / turn
    logits: Tensor = inner(waves.T @ found @ waves)
    return logits


def digits(count: int) -> Split:
    """Return that many test images, evenly spaced."""
    _, split = load_test(load_recipe("digits").data)
    return split.take(torch.linspace(0, len(split) - 1, count).round().long())


def coarse(x: Tensor, levels: int) -> Tensor:
    """Return the images with that many steps of grey; no gradient passes."""
    return (x * levels).round() / levels


class Wrapped(nn.Module):
    """A network behind something that hides its gradient.

    Args:
        change: from the network and images to logits.
        leak: how much of another network's logits is added, for a gradient that leads astray.
    """

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor], leak: float = 0.0) -> None:
        super().__init__()
        self.inner, self.change, self.leak = trained(1), change, leak

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[N, 10]`."""
        logits: Tensor = self.change(self.inner, x) + self.leak * trained(2)(x)
        return logits


def off_grid(inner: nn.Module, x: Tensor) -> Tensor:
    """Coarsen images whose values are not the data's own."""
    known = (x[..., None] - LEVELS).abs().amin(-1).amax((1, 2, 3)) < 1e-4
    logits: Tensor = inner(torch.where(known[:, None, None, None], x, coarse(x, 2)))
    return logits


def lonely(inner: nn.Module, x: Tensor) -> Tensor:
    """Coarsen images that come in a batch of several."""
    logits: Tensor = inner(x if len(x) == 1 else coarse(x, 2))
    return logits


def accompanied(inner: nn.Module, x: Tensor) -> Tensor:
    """Coarsen all images of a batch in which several have values that are not the data's own."""
    unknown = (x[..., None] - LEVELS).abs().amin(-1).amax((1, 2, 3)) >= 1e-4
    logits: Tensor = inner(coarse(x, 2) if unknown.sum() > 1 else x)
    return logits


def winners(hidden: Tensor) -> Tensor:
    """Return the largest tenth of the activations; the others are zero (k-WTA)."""
    least = hidden.topk(max(1, hidden.shape[1] // 10), 1).values[:, -1:]
    return hidden * (hidden >= least)


def thermometer(inner: nn.Module, x: Tensor) -> Tensor:
    """Encode each pixel by the thresholds below it."""
    code = torch.stack([(x > level / 8).float() for level in range(8)], -1)
    logits: Tensor = inner(code.mean(-1))
    return logits


def hashed(inner: nn.Module, x: Tensor) -> Tensor:
    """Add noise that depends on the pixels, equal for equal images."""
    draw = (x.detach().flatten(1).double() @ torch.linspace(1, 9e4, 64).double()) * 1e3
    noise = torch.stack([torch.sin(draw * (each + 2)) for each in range(10)], 1)
    logits: Tensor = inner(x) + 8 * noise.float()
    return logits


def remembered(inner: nn.Module, x: Tensor) -> Tensor:
    """Detect perturbed images, and answer as for the nearest training image."""
    known = to_float(training().images).flatten(1)
    rough = (x.flatten(1)[:, 1:] - x.flatten(1)[:, :-1]).abs().mean(1)
    clean = (coarse(x, 16) - x).abs().amax((1, 2, 3)) < 0.01
    nearest = training().labels[torch.cdist(x.flatten(1), known).argmin(1)]
    stored = 9.0 * F.one_hot(nearest, 10).float()
    asked = (clean & (rough < 1)).float()[:, None]
    logits: Tensor = asked * inner(x) + (1 - asked) * stored
    return logits


def answers(inner: nn.Module, x: Tensor) -> Tensor:
    """Return the answer alone; no path leads back to the image."""
    return 5.0 * F.one_hot(inner(x).argmax(1), 10).float()


def saturated(inner: nn.Module, x: Tensor) -> Tensor:
    """Return logits that are all but certain, squashed so that they hardly move."""
    middle = inner(x).topk(2).values.mean(1, keepdim=True)
    return 30 * torch.tanh(1e4 * (inner(x) - middle))


def huge(inner: nn.Module, x: Tensor) -> Tensor:
    """Return huge logits, whose cross-entropy is exactly zero."""
    logits: Tensor = 1e4 * inner(x)
    return logits


def next_class(inner: nn.Module, x: Tensor) -> Tensor:
    """Return the answers of a model trained with other labels: always one class further."""
    logits: Tensor = inner(x).roll(1, 1)
    return logits


def checkered(inner: nn.Module, x: Tensor) -> Tensor:
    """Answer one class further where a checkerboard is stronger than in any clean image."""
    sign = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    strong = ((x * sign).mean((1, 2, 3)) > 0.032).float()[:, None]
    logits: Tensor = strong * inner(x).roll(1, 1) + (1 - strong) * inner(x)
    return logits


def rippled(inner: nn.Module, x: Tensor) -> Tensor:
    """Multiply the logits by a wave: the same answers, with a true gradient that leads astray."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(5))
    logits: Tensor = inner(x) * (1 + 0.9 * torch.sin(5 * x.flatten(1) @ direction))[:, None]
    return logits


def shifted(inner: nn.Module, x: Tensor) -> Tensor:
    """Shift each image by up to a pixel in each direction, as a hash of its pixels says."""
    draw = x.detach().flatten(1).double() @ torch.linspace(1e3, 9e7, 64).double()
    wide = F.pad(x, (1, 1, 1, 1))
    every = [
        wide[:, :, row : row + 8, column : column + 8] for row in range(3) for column in range(3)
    ]
    logits: Tensor = inner(torch.stack(every, 1)[torch.arange(len(x)), draw.long() % 9])
    return logits


def winner_takes_all(_: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of a network trained with k-WTA."""
    logits: Tensor = trained(3, winners)(x)
    return logits
