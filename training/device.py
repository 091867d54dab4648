"""The device of training, and the precision of its operations."""

from __future__ import annotations

import torch
from torch import Tensor

from dverge_serve.errors import UserError


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; a `torch.device` as it is.

    Raises:
        UserError: another name, or a GPU asked for where there is none.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{name}'", "auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is usable here", "a GPU", "use `device` cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that members' operations are autocast to: bfloat16, or None for float32.

    On a GPU it also turns TF32 off, which PyTorch allows for convolutions by default: in TF32 a
    member's logits differ from the exported file's by more than the gate `parity` allows.

    Raises:
        UserError: bf16 asked for where the hardware lacks it.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    if precision == "bf16" and not able:
        raise UserError(f"precision bf16, which this {device.type} lacks", "fp32 or auto")
    return torch.bfloat16 if able and precision != "fp32" else None


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device`; a GPU copies it from pinned memory, and nobody waits."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
