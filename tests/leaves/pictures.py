"""Pixels to look at, encoded, and the preprocessing that leaves them alone."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dverge_serve.images import Preprocess

Pixels = npt.NDArray[np.uint8]
SIZE = (6, 9)  # height, width


def exactly(mode: Literal["L", "RGB"], size: tuple[int, int] = SIZE) -> Preprocess:
    """Return the preprocessing that leaves an image of this size alone."""
    return Preprocess(mode=mode, resize=size, crop=size)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Return a gradient, which JPEG keeps to within a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * rows / (height - 1), 255 * columns / (width - 1)
    levels: Pixels = np.stack([red, green, (red + green) / 2], axis=2).astype(np.uint8)
    return levels


def waves(height: int, width: int) -> Pixels:
    """Return slow waves that stay clear of black and white."""
    rows, columns = np.mgrid[0:height, 0:width]
    phases = np.stack([rows / 5, columns / 7, (rows + columns) / 9], axis=2)
    levels: Pixels = (128 + 80 * np.sin(phases)).astype(np.uint8)
    return levels


def encode(image: Image.Image | Pixels, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **options)
    return file.getvalue()
