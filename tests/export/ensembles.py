"""Small ensembles of every architecture, with statistics that folding must honour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dverge_serve.engine.card import Card
from dverge_serve.engine.session import Engine
from dverge_serve.images import Preprocess
from training.config import Config
from training.models.build import build_members
from training.models.ensemble import Ensemble


def card_of(channels: int, height: int, width: int, classes: int, count: int) -> Card:
    return Card(
        name="random",
        labels=tuple(f"class {index}" for index in range(classes)),
        preprocess=Preprocess(
            mode="RGB" if channels == 3 else "L", resize=(height, width), crop=(height, width)
        ),
        channel_order="RGB" if channels == 3 else "L",
        members=count,
        dataset="none",
        weights_sha256="0" * 64,
        tool_version="test",
    )


def lively(members: Sequence[nn.Module]) -> Ensemble:
    """Give every BatchNorm statistics that folding must honour; return the ensemble."""
    for member in members:
        for module in member.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
        member.eval().requires_grad_(False)
    return Ensemble(members)


def ensemble(
    architecture: str | tuple[str, ...], count: int, channels: int, size: int, width: int = 4
) -> tuple[Ensemble, Card]:
    table: dict[str, Any] = {
        "name": "parity",
        "method": "standard",
        "architecture": architecture,
        "width": width,
        "members": count,
        "data": {"mode": "RGB" if channels == 3 else "L", "crop": [size, size]},
    }
    made = build_members(Config.from_json(table, "test"), 3, [0.4] * channels, [0.3] * channels)
    return lively(made), card_of(channels, size, size, 3, count)


def engine_of(data: bytes, folder: Path) -> Engine:
    (folder / "model.onnx").write_bytes(data)
    return Engine(folder / "model.onnx", device="cpu")


def probe(card: Card, count: int = 9) -> Any:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (count, *card.input_shape), dtype=np.uint8)
