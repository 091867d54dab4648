"""Devices: the choice of ONNX Runtime's providers, without silent fallbacks."""

from __future__ import annotations

import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime as ort

from dverge_serve.errors import UserError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
PROVIDER = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


def check_device(device: Device) -> None:
    """Check that `device` is available, without using it.

    Raises:
        UserError: no such device, or a GPU asked for where there is no provider or no GPU.
    """
    if device not in get_args(Device):
        raise UserError(f"unknown device '{device}'", ", ".join(get_args(Device)))
    if device in ("auto", "cpu"):
        return
    name = {"cuda": "CUDA", "tensorrt": "TensorRT"}[device]
    if PROVIDER[device] not in ort.get_available_providers():
        raise UserError(
            f"{name} was asked for but this onnxruntime has no {name} provider",
            "onnxruntime-gpu alone",
            "`pip uninstall onnxruntime onnxruntime-gpu`, then `pip install dverge-serve[gpu]`",
        )
    if not has_gpu():
        raise UserError(
            f"{name} was asked for but no NVIDIA GPU is here", "a GPU", "use `device` cpu"
        )


def providers(device: Device, device_id: int = 0) -> list[Any]:
    """Return ONNX Runtime's providers for `device`, the preferred one first.

    Args:
        device: `auto` takes CUDA where there is a GPU and a provider, else the CPU.
        device_id: which GPU.

    Raises:
        UserError: what `check_device` raises.
    """
    check_device(device)
    warn_of_two_runtimes()
    if device == "auto":
        device = "cuda" if CUDA in ort.get_available_providers() and has_gpu() else "cpu"
    if device == "cpu":
        return [CPU]
    ort.preload_dlls()
    # HEURISTIC: the default tries every algorithm for every new batch size, for seconds. No TF32,
    # the default too: its logits are not those that parity and the report were measured on.
    options = {"device_id": device_id, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": 0}
    cuda = (CUDA, options)
    if device == "cuda":
        return [cuda, CPU]
    return [(TENSORRT, {"device_id": device_id}), cuda, CPU]


def check_provider(device: Device, found: str) -> None:
    """Refuse ONNX Runtime's silent fallback.

    Args:
        device: what was asked for.
        found: the provider that a session ended up with.

    Raises:
        UserError: it is another one.
    """
    if device != "auto" and found != PROVIDER[device]:
        raise UserError(
            f"{device} was asked for but ONNX Runtime fell back to {found}",
            "a GPU with matching CUDA and cuDNN libraries",
            "install `dverge-serve[gpu]` or use `device` cpu",
        )


def has_gpu() -> bool:
    """Whether an NVIDIA driver is installed; on Windows only a session shows it."""
    return Path("/dev/nvidiactl").exists() or os.name == "nt"


def warn_of_two_runtimes() -> None:
    """Warn if two builds of ONNX Runtime are installed: they share a folder, the last one wins."""
    names = [
        name
        for name in ("onnxruntime", "onnxruntime-gpu")
        if any(metadata.distributions(name=name))
    ]
    if len(names) > 1:
        warnings.warn(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "`pip uninstall onnxruntime onnxruntime-gpu`, then install one of them",
            RuntimeWarning,
            stacklevel=2,
        )
