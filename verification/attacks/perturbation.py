"""Perturbations: rounded to 8 bits as a server receives them, kept as float16, checked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from training.attacks import Norm


def encode_fp16(
    adversarial: Tensor, images: Tensor, eps: float, norm: Norm
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


def decode_fp16(
    images: npt.NDArray[np.uint8], halves: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """Return the float32 images `[N, C, H, W]` in `[0,1]` that `encode_fp16` stands for."""
    clean = images.astype(np.float32) / np.float32(255)
    return np.asarray(np.clip(clean + halves.astype(np.float32), 0, 1))


def quantize_uint8(
    adversarial: npt.NDArray[np.float32],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: Norm = "linf",
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
        reach = uint8_steps(eps)
        change = np.clip(np.rint(change), -reach, reach)
    else:
        change = np.trunc(change + np.sign(change) * 1e-4)  # 12 must not become 11.99999
    return np.asarray(np.clip(clean + change, 0, 255).astype(np.uint8))


def uint8_steps(eps: float) -> int:
    """Return how many 8-bit steps fit into eps; 0.2 is 51, whatever the floating point says."""
    return int(eps * 255 + 1e-9)


def count_norm_violations(
    floats: npt.NDArray[np.float32],
    delivered: npt.NDArray[np.uint8],
    images: npt.NDArray[np.uint8],
    eps: float,
    norm: Norm = "linf",
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
