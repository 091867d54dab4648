"""The engine: one model file, run by ONNX Runtime, with checked inputs and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

from dverge_serve.cores import cores
from dverge_serve.engine.buckets import Buckets
from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS, Card
from dverge_serve.engine.cpu_parallel import Lanes
from dverge_serve.engine.model_file import cpu_session, gpu_session, read_model
from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.predictions import Prediction, Predictions
from dverge_serve.engine.providers import (
    CPU,
    Device,
    check_device,
    pick_device,
    warn_of_two_runtimes,
)
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.images import ImageError, ImageLike, to_float, to_pixels

if TYPE_CHECKING:
    from typing_extensions import ReadOnly

__all__ = ["Device", "Engine", "check_device"]

BATCH = 256  # images a call at most, where the caller does not choose
PREDICT_BATCH = 64  # images decoded at a time

# Made once: after a call of the model the caches hold none of the checks' data, and making these
# again costs tens of microseconds instead of one.
_FLOAT = np.dtype(np.float32)
_OUTPUTS = [LOGITS, MEMBER_LOGITS]


class ModelMetadata(TypedDict):
    """Metadata of a model, as MAITE's protocols define it; type checkers compare the two."""

    id: ReadOnly[str]
    index2label: NotRequired[ReadOnly[dict[int, str]]]


class Engine:
    """An ensemble loaded from one `model.onnx`, ready to run. Safe to call from many threads.

    The file is read once; those bytes are hashed and loaded, so `sha256` is what runs. It is a
    `Model` for image classification as MAITE's protocols define it: see `__call__`, `metadata`.

    Args:
        path: the model file.
        device: `auto` takes CUDA where it is, for files that are not int8, and warns where it does
            not work; `cuda` and `tensorrt` insist; `cpu`.
        threads: threads for one call; 0 means every core. With W workers, give each its share.
        expected_sha256: refuse any other file.
        spinning: let idle threads spin between calls, too, not within a call alone; faster where
            nothing else runs, wasteful beside other work.
        device_id: which GPU.

    Raises:
        UserError: no such file, not ours, damaged, of a newer schema, with weights in other files,
            not the pinned hash, or a GPU asked for that cannot run it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: Device = "auto",
        threads: int = 0,
        expected_sha256: str = "",
        spinning: bool = True,
        device_id: int = 0,
    ) -> None:
        self.path = Path(path)
        data = read_model(self.path)
        self.sha256 = sha256(data)
        if expected_sha256 and self.sha256 != expected_sha256.lower():
            raise UserError(
                f"{path} has sha256 {self.sha256}",
                f"{expected_sha256} as pinned",
                "put the pinned file in place or change `expected_sha256`",
            )
        warn_of_two_runtimes()

        def load(count: int) -> ort.InferenceSession:
            return cpu_session(data, self.path, threads=count, spinning=spinning)

        # On the CPU first, whatever `device` is: the card says what else can run it.
        session = load(threads)
        metadata = session.get_modelmeta().custom_metadata_map
        self.card = Card.from_metadata(metadata, str(path))
        self.metadata: ModelMetadata = {
            "id": f"{self.card.name}-{self.sha256[:12]}",
            "index2label": dict(enumerate(self.card.labels)),
        }
        self._check_signature(session)
        self._shape = list(self.card.input_shape)
        self._buckets: Buckets | None = None
        self._lanes: Lanes | None = None
        chosen = pick_device(device, self.card.precision)
        if chosen != "cpu":
            try:
                session = gpu_session(data, self.path, chosen, self.card, device_id)
                self._buckets = Buckets(session, self.card, "cuda", device_id)
            except UserError as error:
                if device != "auto":
                    raise
                warnings.warn(f"{error.found}: the CPU is used", RuntimeWarning, stacklevel=2)
        self._session: ort.InferenceSession | None = session
        self.provider: str = session.get_providers()[0]
        if self.provider == CPU and (threads or cores()) > 1:
            self._lanes = Lanes(load, self.card, threads)

    @property
    def lanes(self) -> int:
        """Batches that should run at a time, each `in_lane`: one a thread, or one on a GPU."""
        return self._lanes.count if self._lanes else 1

    @property
    def lane_batch(self) -> int:
        """Most images of a batch `in_lane`: beyond that, images wait for each other in vain."""
        return self._lanes.part if self._lanes else BATCH

    def run(self, images: npt.NDArray[np.float32], *, in_lane: bool = False) -> Scores:
        """Run the model on one batch.

        Args:
            images: float32 `[batch, channels, height, width]` in `[0,1]`, batch at least 1.
            in_lane: on one core alone: `lanes` of these at a time keep all cores busy.

        Raises:
            ValueError: another dtype or shape, NaN, or values outside `[0,1]`.
            RuntimeError: the engine is closed.
        """
        session = self.session
        count, *shape = images.shape or (0,)
        if shape != self._shape or images.dtype != _FLOAT:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; "
                f"expected float32 [batch, {', '.join(map(str, self._shape))}]"
            )
        if not count:
            raise ValueError("an empty batch; expected at least one image")
        # The fastest way in numpy after a call of the model, when the caches are cold. Both are NaN
        # if any pixel is.
        low, high = images.item(images.argmin()), images.item(images.argmax())
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"pixel values from {low} to {high}; expected numbers in [0, 1]")
        if (buckets := self._buckets) is not None:
            return buckets.run(images)
        if (lanes := self._lanes) is not None and (in_lane or lanes.worth(count)):
            return lanes.run(images, here=in_lane)
        return Scores(*session.run(_OUTPUTS, {INPUT: images}))

    def run_all(
        self, images: npt.NDArray[np.float32], batch: int = BATCH, *, in_lane: bool = False
    ) -> Scores:
        """Run any number of images in batches of at most `batch`; the rest is as for `run`."""
        parts = [images[at : at + batch] for at in range(0, len(images) or 1, batch)]
        return Scores.concatenate([self.run(each, in_lane=in_lane) for each in parts])

    def predict(self, images: Sequence[ImageLike]) -> list[Prediction]:
        """Classify images, decoded and preprocessed as in the service.

        Args:
            images: paths, bytes of files, Pillow images, or uint8 arrays
                `[height, width, channels]`, mixed at will.

        Raises:
            ImageError: one of them is not an accepted image; it says which one.
            OSError: a file cannot be read.
            TypeError: one image in place of a list.
            RuntimeError: the engine is closed.
        """
        if isinstance(images, (str, bytes, Path, Image.Image)):
            kind = type(images).__name__
            raise TypeError(f"`images` is one {kind}; expected a list of images: predict([image])")
        found: list[Prediction] = []
        for start in range(0, len(images), PREDICT_BATCH):
            pixels = [
                self._pixels(image, position)
                for position, image in enumerate(images[start : start + PREDICT_BATCH], start)
            ]
            found += Predictions(self.run(to_float(np.stack(pixels))), self.card.labels)
        return found

    def _pixels(self, image: ImageLike, position: int) -> npt.NDArray[np.uint8]:
        try:
            return to_pixels(image, self.card.preprocess)
        except ImageError as error:
            name = image if isinstance(image, (str, Path)) else f"image {position}"
            raise ImageError(error.code, f"{name}: {error}") from error

    def __call__(self, batch: Sequence[npt.ArrayLike], /) -> list[npt.NDArray[np.float64]]:
        """Return class probabilities for each image: MAITE's `Model` protocol.

        Args:
            batch: images `[channels, height, width]` of the model's input shape: floats in `[0,1]`,
                or uint8.

        Returns:
            arrays `[classes]`, each of them the softmax of the members' mean logits.

        Raises:
            ValueError: another dtype or shape, NaN, or values outside `[0,1]`.
            RuntimeError: the engine is closed.
        """
        if not len(batch):
            return []
        arrays = [np.asarray(image) for image in batch]
        images = np.stack([to_float(each) if each.dtype == np.uint8 else each for each in arrays])
        if images.dtype.kind == "f":
            images = images.astype(np.float32, copy=False)
        return list(self.run_all(images).probabilities)

    def warm_up(self, batches: tuple[int, ...] = (1,)) -> None:
        """Run once at each batch size, so that the first request is not slower.

        On a GPU that is every size a batch is padded to, whatever `batches` says.
        """
        for batch in self._buckets.sizes if self._buckets else batches:
            blank = np.zeros((batch, *self.card.input_shape), dtype=np.float32)
            self.run(blank)
            if self._lanes:
                self.run(blank, in_lane=True)

    @property
    def session(self) -> ort.InferenceSession:
        """The ONNX Runtime session, for measurements, without our checks.

        Raises:
            RuntimeError: the engine is closed.
        """
        session = self._session  # read once: another thread may close the engine meanwhile
        if session is None:
            raise RuntimeError(f"the engine of {self.path} is closed")
        return session

    def close(self) -> None:
        """Release the model; running calls finish, later ones are refused."""
        self._session = self._buckets = self._lanes = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_signature(self, session: ort.InferenceSession) -> None:
        classes, members = len(self.card.labels), self.card.members
        expected: dict[str, list[Any]] = {
            INPUT: list(self.card.input_shape),
            LOGITS: [classes],
            MEMBER_LOGITS: [members, classes],
        }
        nodes = [*session.get_inputs(), *session.get_outputs()]
        found = {node.name: list(node.shape[1:]) for node in nodes}
        floats = all(node.type == "tensor(float)" for node in nodes)
        if found != expected or not floats:
            raise UserError(
                f"{self.path} has inputs and outputs {found}",
                f"float32 {expected} as its metadata says",
                "export it again",
            )
