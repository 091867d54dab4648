"""A foreign classifier: any ONNX graph from images to scores, attacked as a black box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import BATCH
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.images import Preprocess
from training.config import EMBEDDED, Config
from training.recipe import data_overrides, load_recipe


class ForeignEngine:
    """A foreign classifier with the engine's interface; its scores count as one member.

    Args:
        path: an ONNX file with one input, float32 `[N, C, H, W]` in `[0,1]`, and one output of
            scores `[N, classes]` (the first, where there are more).
        labels: its classes, in the order of its scores.
        data: the images it was trained for, by name or folder: surrogates are trained on them.

    Raises:
        UserError: not such a file, or another number of classes.
    """

    def __init__(self, path: Path, labels: Sequence[str], data: str) -> None:
        try:
            content = path.read_bytes()
            options = ort.SessionOptions()
            options.log_severity_level = 3
            self._session = ort.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime raises a different class for every way a file can be wrong.
        except Exception as error:
            raise UserError(f"{path} cannot be loaded as an ONNX model", "an ONNX file") from error
        self.sha256 = sha256(content)
        self.provider = "CPUExecutionProvider"
        (given, *more), scores = self._session.get_inputs(), self._session.get_outputs()[0]
        shape = list(given.shape)
        if more or given.type != "tensor(float)" or len(shape) != 4:
            raise UserError(f"{path} takes {given.type} {shape}", "one float32 [N, C, H, W]")
        if not all(isinstance(side, int) for side in shape[1:]) or shape[1] not in (1, 3):
            raise UserError(f"{path} takes images of shape {shape[1:]}", "fixed [1 or 3, H, W]")
        self._names = given.name, scores.name
        self._batch = shape[0] if isinstance(shape[0], int) else None
        names = tuple(labels)
        mode = "L" if shape[1] == 1 else "RGB"
        size = (shape[2], shape[3])
        self.card = Card(
            name=path.stem,
            labels=names,
            preprocess=Preprocess(mode=mode, resize=size, crop=size),  # type: ignore[arg-type]
            channel_order=mode,
            members=1,
            dataset=data,
            training=_config(data, mode, size).to_json(),
            weights_sha256=self.sha256,
            tool_version=__version__,
        )
        found = self.run_all(np.zeros((1, *shape[1:]), np.float32)).logits.shape[1]
        if found != len(names):
            raise UserError(f"{path} gives {found} scores", f"{len(names)}, one for each label")

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        step = self._batch or BATCH
        parts = []
        for at in range(0, len(images), step):
            part = images[at : at + step]
            filled = np.resize(part, (self._batch or len(part), *part.shape[1:]))
            (logits,) = self._session.run([self._names[1]], {self._names[0]: filled})
            logits = np.asarray(logits, np.float32)[: len(part)]
            parts.append(Scores(logits, logits[:, None]))
        return Scores.concatenate(parts)


def _config(data: str, mode: str, size: tuple[int, int]) -> Config:
    """Return how surrogates are trained: by the recipe that goes with the data."""
    recipe = data if data in EMBEDDED else "cifar10-fast" if data == "cifar10" else "images"
    shaped = {"data.mode": mode, "data.crop": list(size), "data.resize": None}
    return load_recipe(recipe, data_overrides(data)).overridden(shaped)
