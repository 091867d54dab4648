"""Perturbations: rounded to 8 bits as a server receives them, stored as float16, checked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.images import to_float
from training.pgd import Norm

LARGEST_HALF_DELTA = 127  # 8-bit steps that fit into int8


def encode_fp16(
    adversarial: Tensor, images: Tensor, eps: float, norm: Norm
) -> npt.NDArray[np.float16]:
    """Return the changes that adversarial images make, in float16, inside the ball.

    Images are rounded to this form before they are scored, so that a replay scores the same.

    Args:
        adversarial: float32 `[N, C, H, W]`.
        images: the clean ones, uint8.
        eps: the ball's radius; a change that rounding would push out is rounded inward.
        norm: of the ball.
    """
    exact = adversarial.cpu().numpy() - to_float(images.cpu().numpy())
    deltas = exact.astype(np.float16)
    over = np.abs(deltas.astype(np.float32)) > (eps if norm == "linf" else np.abs(exact))
    deltas[over] = np.nextafter(deltas[over], np.float16(0))
    return np.asarray(deltas)


def decode_fp16(
    images: npt.NDArray[np.uint8], deltas: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """Return the float32 images `[N, C, H, W]` in `[0,1]` that `encode_fp16` encoded."""
    return np.asarray(np.clip(to_float(images) + deltas.astype(np.float32), 0, 1))


def quantize_uint8(
    adversarial: npt.NDArray[np.float32],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: Norm = "linf",
) -> npt.NDArray[np.uint8]:
    """Round adversarial images to the 8 bits a server receives; `quantize` for NumPy arrays."""
    found = quantize(torch.from_numpy(adversarial), torch.from_numpy(images), eps, norm)
    return np.asarray(found.numpy())


def quantize(adversarial: Tensor, images: Tensor, eps: float, norm: Norm = "linf") -> Tensor:
    """Round adversarial images to the 8 bits a server receives, inside the ball; uint8.

    Args:
        adversarial: float32 `[N, C, H, W]`.
        images: the clean ones, uint8.
        eps: the ball; the largest whole Linf step inside it is `floor(255 eps)`.
        norm: of the ball; in L2 every change is rounded towards zero.
    """
    clean = images.double()
    change = adversarial.double() * 255 - clean
    if norm == "linf":
        reach = uint8_steps(eps)
        change = change.round().clamp(-reach, reach)
    else:
        change = (change + change.sign() * 1e-4).trunc()  # 12 must not become 11.99999
    return (clean + change).clamp(0, 255).to(torch.uint8)


def uint8_steps(eps: float) -> int:
    """Return how many 8-bit steps fit into eps; 0.2 is 51 in spite of rounding errors."""
    return int(eps * 255 + 1e-9)


def count_norm_violations(
    floats: npt.NDArray[np.float32],
    quantized: npt.NDArray[np.uint8],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: Norm = "linf",
) -> int:
    """Return how many images lie outside the ball or the box, in either version."""
    clean = to_float(images)
    axes = (1, 2, 3)
    steps = np.abs(quantized.astype(np.float64) - images)
    if norm == "linf":
        bad = (np.abs(floats - clean) > eps + 1e-6).any(axis=axes)
        bad |= (steps > eps * 255 + 1e-6).any(axis=axes)
    else:
        bad = np.sqrt(np.square(floats.astype(np.float64) - clean).sum(axis=axes)) > eps + 1e-4
        bad |= np.sqrt(np.square(steps).sum(axis=axes)) > eps * 255 + 0.03
    bad |= ~((floats >= 0) & (floats <= 1)).all(axis=axes)
    return int(bad.sum())
