"""Precision variants: the same ensemble in 16-bit floats, or in 8-bit integers.

fp16 halves the file and suits GPUs; int8 suits CPUs with 8-bit dot products (avx512_vnni, AMX,
Arm's). Neither equals fp32, so the bar is how often the answers agree on real images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from dverge_serve.engine.card import INPUT, Card, Precision
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from export.graph import finish, quiet
from training.config import EMBEDDED, Config
from training.data.splits import load_training
from training.seeds import generator

AGREES = {"fp16": 0.995, "int8": 0.98}
CALIBRATION, COMPARED = 256, 1000  # images
BATCH = 64
# The rest is a hundredth of the work: the last matrix product stays exact.
QUANTISED = ["Conv", "Add", "Relu"]

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Agreement:
    """How often a variant answers as its fp32 parent does.

    Args:
        share: of the images, 0..1.
        least: what is asked for.
        images: how many were compared.
    """

    share: float
    least: float
    images: int

    @property
    def holds(self) -> bool:
        """Whether the share is large enough."""
        return self.share >= self.least

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.1f}% of {self.images} answers agree with fp32 "
            f"(at least {100 * self.least:.1f}% asked)"
        )


def images_for(config: Config) -> tuple[Pixels, Pixels]:
    """Return training images to calibrate on, and others to compare on, held-out ones first.

    Args:
        config: names the data set.

    Raises:
        UserError: it cannot be loaded.
    """
    data = load_training(config.data)
    order = torch.randperm(len(data.train), generator=generator("calibration"))
    chosen, rest = order[:CALIBRATION], order[CALIBRATION : CALIBRATION + COMPARED]
    (calibration, _), (others, _) = data.train.fetch([chosen, rest])
    return calibration.numpy(), torch.cat([data.holdout.images, others])[:COMPARED].numpy()


def convert(data: bytes, card: Card, precision: Precision, calibration: Pixels | None) -> bytes:
    """Return an fp32 model file's bytes in another precision.

    Args:
        data: the fp32 file.
        card: of the variant.
        precision: `fp16` or `int8`.
        calibration: uint8 images `[N, channels, height, width]`; int8 needs them.
    """
    if precision == "fp16":
        return finish(_fp16(data), card)
    assert calibration is not None
    return finish(_int8(data, calibration), card)


def agreement(parent: Engine, variant: Engine, pixels: Pixels, precision: str) -> Agreement:
    """Compare a variant's answers with its parent's."""
    images = to_float(pixels)
    same = parent.run_all(images).predictions == variant.run_all(images).predictions
    return Agreement(float(same.mean()), AGREES[precision], len(images))


def at_hand(config: Config) -> bool:
    """Whether the training images can be read here, without a download."""
    path = config.data.path
    return config.data.name in EMBEDDED or (bool(path) and Path(path).exists())


def need_images(config: Config) -> tuple[Pixels, Pixels]:
    """Return `images_for`; where it fails, add that int8 is calibrated on these images.

    Raises:
        UserError: the images cannot be loaded.
    """
    try:
        return images_for(config)
    except UserError as error:
        raise UserError(
            f"int8 is calibrated on training images: {error.found}",
            error.expected or "the images the members were trained on",
            "give `data` FOLDER, or the name of a data set",
        ) from error


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images as the quantiser reads them."""

    def __init__(self, images: npt.NDArray[np.float32]) -> None:
        self._batches: Iterator[npt.NDArray[np.float32]] = iter(
            [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
        )

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def _int8(data: bytes, calibration: Pixels) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, quantised = Path(folder, "plain.onnx"), Path(folder, "quantised.onnx")
        plain.write_bytes(data)
        quantize_static(
            str(plain),
            str(quantised),
            _Batches(to_float(calibration)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Weights of 7 bits: CPUs without 8-bit dot products add two products in 16 bits, and
            # with larger weights those sums overflow there: the file would answer differently.
            reduce_range=True,
            # Unsigned by signed: the pair that 8-bit dot products on x86 multiply.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=QUANTISED,
        )
        return onnx.load(quantised)


def _fp16(data: bytes) -> onnx.ModelProto:
    with quiet():
        model = OnnxModel(convert_float_to_float16(onnx.load_from_string(data), keep_io_types=True))
        model.topological_sort()  # the casts of the input were put last
    halved: onnx.ModelProto = model.model
    return halved
