"""A foreign model file: any ONNX graph from images to scores or labels, opened and checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from dverge_serve.engine.model_file import MAX_BYTES
from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json, sha256
from verification.contract import Layout

DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
SCORES = "scores [N, classes] or [N, classes, 1, 1], or integer labels [N]"
# What ONNX Runtime says of a file that is newer than it.
NEWER_IR = re.compile(r"model IR version: (\d+), max supported IR version: (\d+)")
NEWER_OPSET = re.compile(r"Opset (\d+) is .*support for domain (\S+) is till opset (\d+)", re.S)
UNKNOWN = re.compile(
    r"No Op registered for (\S+) with domain_version of|error: (\S+)\(-?\d+\) is not"
)


@dataclass(frozen=True)
class ForeignFile:
    """An opened ONNX file.

    Args:
        path: of the file.
        sha256: of the file.
        weights_sha256: of the file and of the files that hold its weights.
        session: that runs it, on the CPU.
        input: the name of its input.
        dtype: of its input.
        layout: of the images.
        shape: channels, height and width of an image.
        batch: images in one call, where the file fixes that.
        output: the name of the output that is used.
        classes: scores an image; 0 where it gives labels alone.
    """

    path: Path
    sha256: str
    weights_sha256: str
    session: ort.InferenceSession
    input: str
    dtype: type[np.generic]
    layout: Layout
    shape: tuple[int, int, int]
    batch: int | None
    output: str
    classes: int

    def run(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the used output for one batch of the model's input, of any dtype."""
        if self.dtype is np.uint8:
            values = np.rint(values)
        (found,) = self.session.run([self.output], {self.input: values.astype(self.dtype)})
        return np.asarray(found)


def open_foreign(
    path: Path, *, layout: Layout | None = None, labels_alone: bool = False
) -> ForeignFile:
    """Open an ONNX file.

    The first output of scores is used; the first of labels where there are none.

    Args:
        path: the file; its weights may lie in other files beside it.
        layout: of the images; by default as the input's shape shows it, channels first where it
            could be either.
        labels_alone: use the output of labels, though there are scores.

    Raises:
        UserError: no such file, not ONNX, newer than ONNX Runtime, with weights that are not
            there, or with an input or outputs that are not those of a classifier of images.
    """
    data = _read(path)
    digests = {name: _digest(path.parent / name) for name in _external(data, path)}
    session = _load(data, path)
    name, dtype, layout, shape, batch = _input(session, path, layout)
    whole = (batch or 1, *(shape if layout == "nchw" else (*shape[1:], shape[0])))
    try:
        found = session.run(None, {name: np.zeros(whole, dtype)})
    except Exception as error:  # ONNX Runtime's own, many kinds
        raise UserError(
            f"{path} fails on an image of its own input shape ({_reason(error)})",
            "a graph that runs",
        ) from error
    output, classes = _output(session, found, batch or 1, labels_alone, path)
    own = sha256(data)
    weights = sha256(canonical_json([own, digests])) if digests else own
    return ForeignFile(
        path, own, weights, session, name, dtype, layout, shape, batch, output, classes
    )


def _read(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(path.glob("*.onnx"))
        hint = f"give {inside[0]}" if inside else "give the file itself"
        raise UserError(f"{path} is a folder", "an ONNX file", hint)
    try:
        if path.stat().st_size > MAX_BYTES:
            next_step = "save it with its weights in other files (onnx.save, save_as_external_data)"
            raise UserError(f"{path} is larger than 2 GB", "at most 2 GB", next_step)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}", "an ONNX file", "look at the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "a readable file") from error


def _external(data: bytes, path: Path) -> list[str]:
    """Return the files that hold weights, as the ONNX file names them."""
    try:
        model = onnx.load_from_string(data)
    except Exception as error:  # protobuf's own, many kinds
        model = onnx.ModelProto()
        reason = f"{type(error).__name__}"
    else:
        reason = "no graph in it"
    if not model.graph.node:
        raise UserError(
            f"{path} is not an ONNX file, or not a whole one ({reason})",
            "a model as onnx.save writes it",
            "export it again",
        )
    names = {
        entry.value
        for tensor in _tensors(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{path} keeps weights in {name}", "files beside it", "save it again with onnx.save"
            )
        if not (path.parent / name).is_file():
            raise UserError(
                f"{path} keeps weights in {name}, which is not in {path.parent}",
                "both in one folder",
                f"put {name} beside it",
            )
    return sorted(names)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(data: bytes, path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    folder = str(path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    # ONNX Runtime raises a different class for every way a file can be wrong.
    except Exception as error:
        text, version = str(error), f"ONNX Runtime {ort.__version__}"
        upgrade = "upgrade onnxruntime, or export it for an older version"
        if newer := NEWER_IR.search(text):
            found, read = newer.groups()
            what = f"{path} has IR version {found}"
            raise UserError(what, f"{read} or older, which {version} reads", upgrade) from error
        if newer := NEWER_OPSET.search(text):
            found, domain, read = newer.groups()
            what = f"{path} has opset {found} of {domain}"
            raise UserError(what, f"{read} or older, which {version} reads", upgrade) from error
        if unknown := UNKNOWN.search(text):
            name = next(filter(None, unknown.groups()))
            what = f"{path} has the operator {name}, which {version} does not know"
            raise UserError(what, "the operators of ONNX", "export it without it") from error
        raise UserError(
            f"{path} cannot be loaded ({_reason(error)})", "a file that ONNX Runtime loads"
        ) from error


def _input(
    session: ort.InferenceSession, path: Path, wanted: Layout | None
) -> tuple[str, type[np.generic], Layout, tuple[int, int, int], int | None]:
    """Return name, dtype, layout, image shape and fixed batch of the only input."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs)
        raise UserError(
            f"{path} takes {len(inputs)} inputs ({names})",
            "one, the images",
            "export it with the others as constants",
        )
    (given,) = inputs
    shape = list(given.shape)
    if given.type not in DTYPES or len(shape) != 4:
        raise UserError(
            f"{path} takes {given.type} {shape}",
            f"images of four dimensions, {', '.join(DTYPES)}",
        )
    sides = [side if isinstance(side, int) else 0 for side in shape[1:]]
    ends: dict[Layout, int] = {"nchw": sides[0], "nhwc": sides[2]}
    able = [layout for layout, channels in ends.items() if channels in (1, 3)]
    if not all(sides) or not able:
        raise UserError(
            f"{path} takes images of shape {shape[1:]}",
            "a fixed [channels, height, width] or [height, width, channels], 1 or 3 channels",
            "export it with its size fixed",
        )
    layout = wanted or able[0]
    if layout not in able:
        raise UserError(
            f"{path} takes images of shape {sides}, which is {able[0]}", f"`layout` {layout}"
        )
    channels, height, width = sides if layout == "nchw" else (sides[2], *sides[:2])
    batch = shape[0] if isinstance(shape[0], int) else None
    return given.name, DTYPES[given.type], layout, (channels, height, width), batch


def _output(
    session: ort.InferenceSession, found: list[Any], batch: int, labels_alone: bool, path: Path
) -> tuple[str, int]:
    """Return the name of the output to use, and its number of scores (0: it gives labels)."""
    described, scores, labels = [], [], []
    for node, value in zip(session.get_outputs(), found, strict=True):
        if not isinstance(value, np.ndarray):
            described.append(f"{node.name} {node.type}")
            continue
        described.append(f"{node.name} {value.dtype} {list(value.shape)}")
        count, *rest = value.shape or (0,)
        ends = rest[1:] in ([], [1, 1])
        if value.dtype.kind == "f" and count == batch and ends and rest and rest[0] > 1:
            scores.append((node.name, rest[0]))
        if value.dtype.kind in "iu" and count == batch and rest in ([], [1]):
            labels.append((node.name, 0))
    usable = labels if labels_alone else scores or labels
    if usable:
        return usable[0]
    sequence = any(not isinstance(value, np.ndarray) for value in found)
    raise UserError(
        f"{path} gives {'sequences' if sequence else 'no scores'}: {', '.join(described)}",
        "integer labels [N]" if labels_alone else SCORES,
        "export it without ZipMap (skl2onnx: options={'zipmap': False})"
        if sequence
        else "export the part that classifies",
    )


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
