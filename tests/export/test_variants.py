"""fp16 and int8 say what fp32 says: architectures, numbers of members, and sizes of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dverge_serve.engine.card import FusionMode, Precision
from dverge_serve.images import to_float
from export.graph import build_graph
from export.precision import convert
from tests.export.ensembles import engine_of, ensemble, probe

# Of random networks, whose logits are small and close: the error against their spread.
ERROR = {"fp16": 0.01, "int8": 0.25}


@pytest.mark.parametrize(
    ("architecture", "count", "channels", "size", "form"),
    [
        ("resnet8", 8, 1, 8, "grouped"),
        ("resnet20", 3, 3, 16, "branches"),
        ("resnet11-bottleneck", 3, 3, 16, "grouped"),
        (("resnet8", "resnet14"), 2, 3, 16, "branches"),
        ("resnet8", 2, 3, 224, "grouped"),
        ("torchvision:resnet18", 1, 3, 64, "branches"),
    ],
)
def test_variants(
    architecture: str,
    count: int,
    channels: int,
    size: int,
    form: FusionMode,
    tmp_path: Path,
) -> None:
    members, card = ensemble(architecture, count, channels, size)
    card = replace(card, form=form)
    data = build_graph(members, card)
    pixels = probe(card, 12)
    parent = engine_of(data, tmp_path).run_all(to_float(pixels))
    for precision in get_args(Precision)[1:]:
        changed = convert(data, replace(card, precision=precision), precision, pixels)
        variant = engine_of(changed, tmp_path)
        assert variant.card.precision == precision
        found = variant.run_all(to_float(pixels))
        for one, other in (
            (parent.logits, found.logits),
            (parent.member_logits, found.member_logits),
        ):
            assert one.shape == other.shape
            assert np.abs(one - other).mean() <= ERROR[precision] * one.std()
