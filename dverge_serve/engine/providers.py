"""Devices: the choice of ONNX Runtime's providers, without silent fallbacks."""

from __future__ import annotations

import ctypes
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime as ort

from dverge_serve.engine.buckets import LARGEST
from dverge_serve.engine.card import INPUT, Card, Precision
from dverge_serve.errors import UserError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
PROVIDER = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


def check_device(device: Device, precision: Precision = "fp32") -> None:
    """Check that `device` is available for models of this precision, without using it.

    Raises:
        UserError: no such device, a GPU asked for where there is no provider or no GPU, or int8,
            for which CUDA has no kernels.
    """
    if device not in get_args(Device):
        raise UserError(f"unknown device '{device}'", ", ".join(get_args(Device)))
    if device in ("auto", "cpu"):
        return
    name = {"cuda": "CUDA", "tensorrt": "TensorRT"}[device]
    if precision == "int8":
        raise UserError(
            f"{name} was asked for but the model is int8, which is for CPUs",
            "an fp32 or fp16 model",
            "use `device` cpu, or export it with `precision` fp16",
        )
    if PROVIDER[device] not in ort.get_available_providers():
        raise UserError(
            f"{name} was asked for but this onnxruntime has no {name} provider",
            "onnxruntime-gpu alone",
            "`pip uninstall onnxruntime onnxruntime-gpu`, then `pip install dverge-serve[gpu]`",
        )
    if not gpus():
        raise UserError(
            f"{name} was asked for but no NVIDIA GPU is here", "a GPU", "use `device` cpu"
        )


def pick_device(device: Device, precision: Precision = "fp32") -> Device:
    """Return `device`; for `auto` CUDA, where a GPU, a provider and kernels are there, or the CPU.

    Raises:
        UserError: what `check_device` raises.
    """
    check_device(device, precision)
    if device != "auto":
        return device
    able = precision != "int8" and CUDA in ort.get_available_providers() and gpus() > 0
    return "cuda" if able else "cpu"


def providers(device: Device, card: Card, device_id: int = 0) -> list[Any]:
    """Return ONNX Runtime's providers for `cuda` or `tensorrt`, the preferred one first.

    Args:
        device: one that `pick_device` returned.
        card: of the model.
        device_id: which GPU.
    """
    # HEURISTIC: the default tries every algorithm for every new batch size, for seconds. No TF32,
    # the default too: its logits are not those that parity and the report were measured on.
    options = {"device_id": device_id, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": 0}
    cuda = (CUDA, options)
    if device == "cuda":
        return [cuda, CPU]
    # One engine for every batch size; else each new size would build another, for minutes. Engines
    # are not cached: ONNX Runtime's names of them do not tell a file's weights from another's.
    shapes = {
        f"trt_profile_{which}_shapes": f"{INPUT}:{'x'.join(map(str, (batch, *card.input_shape)))}"
        for which, batch in (("min", 1), ("opt", LARGEST), ("max", LARGEST))
    }
    return [(TENSORRT, {"device_id": device_id} | shapes), cuda, CPU]


def gpus() -> int:
    """Return how many NVIDIA GPUs this process may use.

    The driver counts them: it knows what `CUDA_VISIBLE_DEVICES` means, what a container may see,
    and GPUs without files in `/dev`, as in WSL2.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        # A GPU without its driver's library: a session will say what is missing.
        return int(Path("/dev/nvidiactl").exists())
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


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
