"""The budget of surrogates for a classifier whose own training is not known."""

from __future__ import annotations

from typing import Any

from training.config import Config

PIXELS = 60_000_000  # that each network sees, all epochs together
FEWEST, MOST = 4, 60  # epochs
# What an attacker with little time takes: small networks and many small steps. A mirror image may
# be of another class (signs, letters), and nobody says whether.
SETTINGS: dict[str, Any] = {
    "architecture": "resnet14",
    "batch_size": 32,
    "data.flip": False,
}


def within_pixels(config: Config, images: int) -> Config:
    """Return how surrogates are trained so that each network sees `PIXELS` pixels.

    Args:
        config: of the recipe that goes with the data.
        images: for training.
    """
    height, width = config.data.crop
    epochs = min(max(PIXELS // (images * height * width), FEWEST), MOST)
    return config.overridden(SETTINGS | {"standard.epochs": epochs})
