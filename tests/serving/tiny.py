"""Tiny models and images whose answers follow from a line of arithmetic."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dverge_serve.engine.card import Card
from dverge_serve.engine.report import report_path
from dverge_serve.files import sha256
from dverge_serve.images import Preprocess

SIDE = 8
Floats = npt.NDArray[np.float32]
PNG = {"content-type": "image/png"}


def save_linear_model(
    path: Path, weights: Floats, bias: Floats, labels: tuple[str, ...], **card: Any
) -> str:
    """Write an ensemble of linear members and return the file's sha256.

    Args:
        weights: `[members, classes, channels, side, side]`.
        bias: `[members, classes]`.
    """
    members, classes, channels, side = weights.shape[:4]
    nodes = [helper.make_node("Flatten", ["images"], ["flat"])]
    tensors = [numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")]
    for member in range(members):
        matrix = weights[member].reshape(classes, -1).T.astype(np.float32)
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"weight{member}"))
        tensors.append(numpy_helper.from_array(bias[member].astype(np.float32), f"bias{member}"))
        nodes += [
            helper.make_node("Gemm", ["flat", f"weight{member}", f"bias{member}"], [f"z{member}"]),
            helper.make_node("Unsqueeze", [f"z{member}", "axis"], [f"one{member}"]),
        ]
    ones = [f"one{member}" for member in range(members)]
    nodes += [
        helper.make_node("Concat", ones, ["member_logits"], axis=1),
        helper.make_node("Mean", [f"z{member}" for member in range(members)], ["logits"]),
    ]
    shape = ["batch", channels, side, side]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes]),
            helper.make_tensor_value_info(
                "member_logits", TensorProto.FLOAT, ["batch", members, classes]
            ),
        ],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    fields: dict[str, Any] = {
        "name": "tiny",
        "labels": labels,
        "preprocess": Preprocess(
            mode="L" if channels == 1 else "RGB", resize=(side, side), crop=(side, side)
        ),
        "channel_order": "L" if channels == 1 else "RGB",
        "members": members,
        "dataset": "none",
        "weights_sha256": "0" * 64,
        "tool_version": "0",
        "training": {"seed": 7},
    }
    entry = model.metadata_props.add()
    entry.key, entry.value = "dverge", json.dumps(Card(**{**fields, **card}).to_json())
    data = model.SerializeToString()
    path.write_bytes(data)
    return sha256(data)


# Members of the gray model: class "bright" scores GAINS[m] * brightness, class "dark" LEVELS[m].
GAINS = (8.0, 6.0, 4.0)
LEVELS = (2.0, 2.0, 2.4)


def save_gray_model(
    path: Path, labels: tuple[str, str] = ("bright", "dark"), side: int = SIDE, **card: Any
) -> str:
    """Write a model that tells bright images from dark ones; returns the file's sha256.

    A flat image of brightness v in [0,1] gets member logits (GAINS[m] * v, LEVELS[m]).
    """
    weights = np.zeros((3, 2, 1, side, side), dtype=np.float32)
    for member, gain in enumerate(GAINS):
        weights[member, 0] = gain / side**2
    bias = np.array([[0.0, level] for level in LEVELS], dtype=np.float32)
    return save_linear_model(path, weights, bias, labels, **card)


def gray_logits(brightness: float) -> npt.NDArray[np.float64]:
    """Return the gray model's member logits `[members, classes]` for a flat image."""
    return np.array([[gain * brightness, level] for gain, level in zip(GAINS, LEVELS, strict=True)])


COLOURS = ("red", "green", "blue", "white", "black")


def save_colour_model(path: Path) -> str:
    """Write a model of 2 equal members that names the colour of an 8x8 image's top left pixels."""
    weights = np.zeros((2, 5, 3, SIDE, SIDE), dtype=np.float32)
    signs = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, 1), (-1, -1, -1))
    for index, sign in enumerate(signs):
        for channel in range(3):
            weights[:, index, channel, :2, :2] = sign[channel]
    bias = np.tile(np.array([0, 0, 0, -6, 2], dtype=np.float32), (2, 1))
    return save_linear_model(path, weights, bias, COLOURS)


def save_report(model: Path, digest: str, threshold: float = 0.1) -> dict[str, Any]:
    """Write a report beside `model` that is about the file with this sha256."""
    figure = {"value": 0.97, "low": 0.95, "high": 0.99, "n": 360}
    report = {
        "schema_version": 1,
        "model": {"sha256": digest},
        "verdict": "VALID",
        "clean_accuracy": figure,
        "robust_accuracy": [{"eps": 0.1, "transfer": figure, "white_box": None, "all": figure}],
        "disagreement": {
            "score": "jensen-shannon",
            "threshold": threshold,
            "false_positive_rate": 0.05,
            "calibration_images": 100,
        },
    }
    report_path(model).write_text(json.dumps(report))
    return report


def flat(brightness: int, mode: str = "L") -> Image.Image:
    """Return a flat 8x8 image of one 8-bit brightness."""
    return Image.new("L", (SIDE, SIDE), brightness).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(brightness: int) -> bytes:
    """Return a flat 8x8 PNG."""
    return encode(flat(brightness))
