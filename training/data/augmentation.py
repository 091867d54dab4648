"""Random affine maps and random light: augmentation of a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Augment
from training.device import send


def jitter(images: Tensor, settings: Augment, draw: torch.Generator) -> Tensor:
    """Return images float `[B, C, H, W]` in `[0,1]`, each moved and lit at random.

    Affine maps are about the centre, bilinear; what comes in from outside repeats the border.
    Brightness multiplies all pixels; contrast multiplies their distance from the image's mean, as
    in torchvision's `RandomAffine` and `ColorJitter`. Nothing is drawn for what is switched off.

    Args:
        images: anywhere.
        settings: how much.
        draw: on the CPU.
    """

    def random(spread: float) -> Tensor:
        drawn = (2 * torch.rand(len(images), generator=draw) - 1) * spread
        return send(drawn, images.device)

    if settings.rotate or settings.scale or settings.shear:
        angle = random(math.radians(settings.rotate))
        size = 1 + random(settings.scale)
        slope = random(math.radians(settings.shear)).tan()
        height, width = images.shape[2:]
        # From a place in the result to its place in the image, in units of half a side each.
        cos, sin, ratio = angle.cos() / size, angle.sin() / size, width / height
        zero = torch.zeros_like(cos)
        rows = [cos, (cos * slope - sin) / ratio, zero], [sin * ratio, cos + sin * slope, zero]
        maps = torch.stack([torch.stack(row, 1) for row in rows], 1)
        places = F.affine_grid(maps, list(images.shape), align_corners=False)
        images = F.grid_sample(images, places, padding_mode="border", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last)
    if settings.brightness or settings.contrast:
        light, contrast = (
            1 + random(spread)[:, None, None, None]
            for spread in (settings.brightness, settings.contrast)
        )
        images = images * light
        mean = images.mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean).clamp(0, 1)
    return images
