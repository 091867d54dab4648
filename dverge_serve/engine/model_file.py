"""A model file: its bytes, and ONNX Runtime's sessions made from them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dverge_serve.engine.card import INPUT, Card
from dverge_serve.engine.providers import CPU, PROVIDER, Device, providers
from dverge_serve.errors import UserError, brief

MAX_BYTES = 2 * 1024**3
WARNINGS, NOTHING = 2, 4  # severities from which ONNX Runtime prints; the first is its default


def read_model(path: Path) -> bytes:
    """Return the bytes of a model file.

    Raises:
        UserError: no such file, one that cannot be read, or one larger than 2 GB.
    """
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


def cpu_session(data: bytes, path: Path, *, threads: int, spinning: bool) -> ort.InferenceSession:
    """Return a session on the CPU.

    Args:
        data: of the file.
        path: the file, for messages.
        threads: of one call; 0 means every core.
        spinning: whether idle threads spin between calls.

    Raises:
        UserError: a file that ONNX Runtime cannot load, or with weights in other files.
    """
    options = _options(path)
    options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return _session(data, options, [CPU])
    # ONNX Runtime raises a different class for every way a file can be wrong.
    except Exception as error:
        text = brief(error)
        if "external" in text.lower():
            raise UserError(
                f"{path} keeps its weights in other files",
                "one whole ONNX file",
                "export it again with `dverge export`",
            ) from error
        raise UserError(
            f"{path} cannot be loaded as an ONNX model ({text})",
            "a whole file written by `dverge export`",
        ) from error


def gpu_session(
    data: bytes, path: Path, device: Device, card: Card, device_id: int
) -> ort.InferenceSession:
    """Return a session on a GPU, for a file that a session on the CPU could be made of.

    ONNX Runtime prints what it lacks on standard output as it loads the CUDA libraries, and then in
    red on standard error for every session. Here it prints nothing; the error has the first reason.

    Args:
        data: of the file.
        path: the file, for messages.
        device: `cuda` or `tensorrt`.
        card: of the file.
        device_id: which GPU.

    Raises:
        UserError: the GPU cannot run it.
    """
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ort.preload_dlls()
    # "Failed to load NAME: NAME: REASON"
    lines = printed.getvalue().splitlines()
    missing = [line.partition(": ")[2] for line in lines if line.startswith("Failed to load ")]
    options = _options(path)
    options.intra_op_num_threads = 1  # the work is the GPU's
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    ort.set_default_logger_severity(NOTHING)
    try:
        session = _session(data, options, providers(device, card, device_id))
        # Some libraries are loaded, and kernels for this GPU looked for, when they are first used.
        session.run(None, {INPUT: np.zeros((1, *card.input_shape), np.float32)})
    except Exception as error:
        raise UserError(
            f"{device} cannot run {path} ({(missing or [brief(error)])[0]})",
            "a GPU with its libraries, and free memory on it",
            "install `dverge-serve[gpu]` or use `device` cpu",
        ) from error
    finally:
        ort.set_default_logger_severity(WARNINGS)
    check_placement(device, session, missing)
    return session


def check_placement(device: Device, session: ort.InferenceSession, missing: list[str]) -> None:
    """Refuse ONNX Runtime's silent fallbacks, of a whole session and of single operations.

    Convolutions and matrix products must be on the GPU. The arithmetic of shapes may be on the CPU,
    where ONNX Runtime puts that of a vision transformer on purpose; its own option
    `session.disable_cpu_ep_fallback` would refuse such a model.

    Args:
        device: `cuda` or `tensorrt`.
        session: made with `session.record_ep_graph_assignment_info`.
        missing: libraries that could not be loaded, and why.

    Raises:
        UserError: work is placed elsewhere.
    """
    found = session.get_providers()[0]
    if found != PROVIDER[device]:
        reason = f" ({missing[0]})" if missing else ""
        raise UserError(
            f"ONNX Runtime cannot use {device}, it fell back to {found}{reason}",
            "a GPU with matching CUDA and cuDNN libraries",
            "install `dverge-serve[gpu]` or use `device` cpu",
        )
    stray = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == CPU
        for node in part.get_nodes()
        if any(kind in node.op_type for kind in ("Conv", "Gemm", "MatMul"))
    }
    if stray:
        raise UserError(
            f"{device} has no kernel for the model's {', '.join(sorted(stray))}",
            "a model that runs on the GPU as a whole",
            "use `device` cpu",
        )


def _options(path: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Bytes have no folder for weights in other files. This one does not exist, so that no weights
    # are read from the folder that the process runs in.
    folder = str(path.parent / "no-external-data")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return options


def _session(data: bytes, options: ort.SessionOptions, on: list[Any]) -> ort.InferenceSession:
    # Without its fallback: after an error of the GPU, in any call, it would go on on the CPU.
    return ort.InferenceSession(data, options, providers=on, enable_fallback=0)
