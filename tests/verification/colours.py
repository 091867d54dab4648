"""Classes that are colours, and tiny ONNX classifiers of them under every contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from training.data.splits import Split, TrainingData
from verification.contract import Contract

SIDE = 8
# Sorted, as class folders are; every change of scale, shift or channels leads to another class.
COLOURS = {
    "brick": (0.6, 0.2, 0.1),
    "coal": (0.1, 0.1, 0.1),
    "ivory": (0.9, 0.9, 0.8),
    "moss": (0.3, 0.4, 0.1),
    "sea": (0.1, 0.3, 0.6),
    "slate": (0.4, 0.5, 0.5),
}
NAMES = tuple(COLOURS)
THEIRS = ("sea", "slate", "ivory", "brick", "moss", "coal")  # the models' own order
POINTS = np.array([COLOURS[name] for name in THEIRS], np.float32)
SHARP = 40.0


def training_data(each: int = 12) -> TrainingData:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(NAMES)), each)
    points = np.array([COLOURS[name] for name in NAMES])[labels][:, :, None, None]
    noisy = points + 0.05 * draw.normal(size=(len(labels), 3, SIDE, SIDE))
    pixels = torch.from_numpy((noisy.clip(0, 1) * 255).astype(np.uint8))
    split = Split(pixels, torch.from_numpy(labels))
    return TrainingData(NAMES, split, split)


def folder(path: Path, each: int = 12) -> Path:
    """Write the same images as class folders; the second half of each class is the test part."""
    split = training_data(each).holdout
    for at, (image, label) in enumerate(zip(split.images.numpy(), split.labels, strict=True)):
        part = "test" if at % each >= each // 2 else "train"
        place = path / part / NAMES[int(label)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{at}.png")
    return path


def logits(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The answer of every model here, in its own order: the nearest colour's logit is largest."""
    means = images.mean((2, 3))
    return np.asarray(SHARP * (2 * means @ POINTS.T - (POINTS**2).sum(1)), np.float32)


def save(
    path: Path,
    contract: Contract | None = None,
    *,
    batch: int | str = "n",
    shape: tuple[int, ...] = (),
    sharp: float = SHARP,
    dtype: int = TensorProto.FLOAT,
    operator: str = "",
    ir: int = 10,
    opset: int = 17,
) -> Path:
    """Write the classifier that a contract describes.

    Args:
        path: of the file.
        contract: its input and outputs.
        batch: a fixed one is also written into a Reshape.
        shape: of its scores behind the classes, e.g. (1, 1).
        sharp: factor on its logits.
        dtype: of its input.
        operator: put between, of the domain com.microsoft.
        ir, opset: versions that the file claims.
    """
    contract = contract or Contract()
    tensors: dict[str, Any] = {
        "max": np.float32(contract.pixel_max),
        "mean": np.array(contract.mean, np.float32)[:, None, None],
        "std": np.array(contract.std, np.float32)[:, None, None],
        "weights": np.ascontiguousarray(2 * sharp * POINTS.T),
        "bias": -sharp * (POINTS**2).sum(1),
        "flip": np.array([2, 1, 0]),
        "flat": np.array([batch if isinstance(batch, int) else -1, 3]),
        "shape": np.array([batch if isinstance(batch, int) else -1, len(THEIRS), *shape]),
    }
    last = "pixels"
    nodes: list[Any] = []

    def then(kind: str, *more: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(kind, [last, *more], [f"x{len(nodes)}"], **attributes))
        last = f"x{len(nodes) - 1}"

    if dtype != TensorProto.FLOAT:
        then("Cast", to=TensorProto.FLOAT)
    if contract.layout == "nhwc":
        then("Transpose", perm=[0, 3, 1, 2])
    then("Mul", "std")
    then("Add", "mean")
    then("Div", "max")
    if contract.channels == "bgr":
        then("Gather", "flip", axis=1)
    if operator:
        then(operator)
        nodes[-1].domain = "com.microsoft"
    then("GlobalAveragePool")
    then("Reshape", "flat")
    then("MatMul", "weights")
    then("Add", "bias")
    if shape:
        then("Reshape", "shape")
    if contract.outputs == "softmax":
        then("Softmax", axis=1)
    if contract.outputs == "labels":
        then("ArgMax", axis=1, keepdims=0)
    nodes[-1].output[0] = "answer"
    sides = [3, SIDE, SIDE] if contract.layout == "nchw" else [SIDE, SIDE, 3]
    kind = TensorProto.INT64 if contract.outputs == "labels" else TensorProto.FLOAT
    ends = [] if contract.outputs == "labels" else [len(THEIRS), *shape]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", dtype, [batch, *sides])],
        [helper.make_tensor_value_info("answer", kind, [batch, *ends])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), path)
    return path
