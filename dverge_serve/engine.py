"""The one place that runs a model file: ONNX Runtime behind our contract."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve.contract import INPUT, LOGITS, MEMBER_LOGITS, Card
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.scores import Scores

Device = Literal["auto", "cpu", "cuda"]
MAX_BYTES = 2 * 1024**3
BATCH = 256  # images a call at most, where the caller does not choose


class Engine:
    """An ensemble loaded from one `model.onnx`, ready to run. Safe to call from many threads.

    The file is read once; those bytes are hashed and loaded, so `sha256` is what runs.

    Args:
        path: the model file.
        device: `auto` takes CUDA where it works, `cuda` insists on it.
        threads: threads for one call; 0 means every core.
        expected_sha256: refuse any other file.
        spinning: let idle threads spin between calls; faster alone, wasteful beside other workers.
        device_id: which GPU.

    Raises:
        UserError: no such file, not ours, damaged, of a newer schema, not the pinned hash, or
            CUDA asked for and not there.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: Device = "auto",
        threads: int = 0,
        expected_sha256: str = "",
        spinning: bool = True,
        device_id: int = 0,
    ) -> None:
        self.path = Path(path)
        data = _read(self.path)
        self.sha256 = sha256(data)
        if expected_sha256 and self.sha256 != expected_sha256.lower():
            raise UserError(
                f"{path} has sha256 {self.sha256}",
                f"{expected_sha256} as pinned",
                "put the pinned file in place or change DVERGE_MODEL_SHA256",
            )
        providers = _providers(device, device_id)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(data, options, providers=providers)
        # ONNX Runtime raises a different class for every way a file can be wrong.
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
            raise UserError(
                f"{path} cannot be loaded as an ONNX model ({reason})",
                "a whole file written by `dverge export`",
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise UserError(
                f"CUDA was asked for but ONNX Runtime fell back to {self.provider}",
                "a GPU with matching CUDA and cuDNN libraries",
                "install `dverge-serve[gpu]` or use --device cpu",
            )
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.card = Card.from_metadata(metadata, str(path))
        self._check_signature()

    def run(self, images: npt.NDArray[np.float32]) -> Scores:
        """Run the model on one batch.

        Args:
            images: float32 `[batch, channels, height, width]` in `[0,1]`, batch at least 1.

        Raises:
            ValueError: another dtype or shape, NaN, or values outside `[0,1]`.
        """
        shape = self.card.input_shape
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; "
                f"expected float32 [batch, {', '.join(map(str, shape))}]"
            )
        if not len(images):
            raise ValueError("an empty batch; expected at least one image")
        low, high = float(images.min()), float(images.max())
        if not (low >= 0.0 and high <= 1.0):  # also false for NaN
            raise ValueError(f"pixel values from {low} to {high}; expected numbers in [0, 1]")
        logits, member_logits = self._session.run([LOGITS, MEMBER_LOGITS], {INPUT: images})
        return Scores(logits, member_logits)

    def run_all(self, images: npt.NDArray[np.float32], batch: int = BATCH) -> Scores:
        """Run any number of images in batches of at most `batch`."""
        return Scores.concatenate(
            [self.run(images[at : at + batch]) for at in range(0, len(images), batch)]
        )

    def warm_up(self, batches: tuple[int, ...] = (1,)) -> None:
        """Run once at each batch size, so that the first caller does not pay for it."""
        for batch in batches:
            self.run(np.zeros((batch, *self.card.input_shape), dtype=np.float32))

    def _check_signature(self) -> None:
        classes, members = len(self.card.labels), self.card.members
        expected: dict[str, list[Any]] = {
            INPUT: list(self.card.input_shape),
            LOGITS: [classes],
            MEMBER_LOGITS: [members, classes],
        }
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = {node.name: list(node.shape[1:]) for node in nodes}
        floats = all(node.type == "tensor(float)" for node in nodes)
        if found != expected or not floats:
            raise UserError(
                f"{self.path} has inputs and outputs {found}",
                f"float32 {expected} as its metadata says",
                "export it again",
            )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than 2 GB", "one ONNX file of at most 2 GB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"no model at {path}",
            "a file written by `dverge export`",
            "run `dverge export model.onnx`, or `dverge demo` for an example",
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "a readable file") from error


def check_device(device: Device) -> None:
    """Check that `device` can be here, without touching it.

    Raises:
        UserError: CUDA asked for where there is no provider or no GPU.
    """
    if device == "cuda" and not _has_cuda_provider():
        raise UserError(
            "CUDA was asked for but this onnxruntime has no CUDA provider",
            "onnxruntime-gpu alone",
            "`pip uninstall onnxruntime onnxruntime-gpu`, then `pip install dverge-serve[gpu]`",
        )
    if device == "cuda" and not _has_gpu():
        raise UserError("CUDA was asked for but no NVIDIA GPU is here", "a GPU", "use --device cpu")


def _has_cuda_provider() -> bool:
    return "CUDAExecutionProvider" in ort.get_available_providers()


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or os.name == "nt"


def _providers(device: Device, device_id: int) -> list[Any]:
    check_device(device)
    if device == "cpu" or not (_has_cuda_provider() and _has_gpu()):
        return ["CPUExecutionProvider"]
    ort.preload_dlls()
    options = {"device_id": device_id, "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
