"""A pretend CUDA device: CPU tensors that say they are on `cuda`, and refuse what a GPU refuses.

They refuse `numpy()`, refuse to meet CPU tensors in one operation (scalars and indices excepted, as
on a GPU) and, inside `no_waiting()`, whatever makes the host wait for the device. Generators of the
device draw other numbers than the CPU's. Convolutions and matrix products are rounded to TF32 where
PyTorch allows it, which it does for convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
WAITS = {
    *("cpu", "item", "tolist", "nonzero", "masked_select"),
    *("__bool__", "__float__", "__int__", "__index__"),
}
MAY_MEET = {"to", "copy_", "type", "as_subclass", "__getitem__", "__setitem__"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "einsum"}
ATTRIBUTES = {"device": CUDA, "is_cuda": True, "is_cpu": False}


class CudaTensor(Tensor):
    """A CPU tensor that says it is on the pretend GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class CudaGenerator(torch.Generator):
    """A generator that says it is on the pretend GPU."""

    device = CUDA

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed ^ 1)


class PretendCuda(TorchFunctionMode):
    """Lets factories and copies with `device="cuda"` give pretend tensors."""

    waiting_is_wrong = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextlib.contextmanager
def pretend_cuda() -> Iterator[torch.device]:
    """Offer a pretend GPU while the block runs."""
    plain = torch.Generator
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed = cudnn.allow_tf32, products.allow_tf32
    with pytest.MonkeyPatch.context() as patch, PretendCuda():
        patch.setattr(
            torch,
            "Generator",
            lambda device="cpu": CudaGenerator() if _device(device) == "cuda" else plain(),
        )
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        cudnn.allow_tf32, products.allow_tf32 = True, False  # as in a fresh process
        try:
            yield CUDA
        finally:
            cudnn.allow_tf32, products.allow_tf32 = allowed
            torch.__future__.set_overwrite_module_params_on_conversion(before)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse to wait for the device, and copies to it that do, while the block runs."""
    PretendCuda.waiting_is_wrong = True
    try:
        yield
    finally:
        PretendCuda.waiting_is_wrong = False


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    every = list(tree_iter((args, kwargs)))
    gpu = [each for each in every if _is_gpu(each)]
    host = [each for each in every if isinstance(each, Tensor) and not _is_gpu(each)]
    if name == "__get__":
        attribute = (resolve_name(func) or "").split(".")[-2]
        if gpu and attribute in ATTRIBUTES:
            return ATTRIBUTES[attribute]
        return _placed(_plainly(func, args, kwargs), bool(gpu))
    if name in ("__set__", "_parse_to", "backward", "register_hook", "__repr__"):
        return _plainly(func, args, kwargs)
    if name == "__deepcopy__" and gpu:
        return _copied(*args)
    if name == "_has_compatible_shallow_copy_type":
        return not (gpu and host)
    if gpu and name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
    if name == "pin_memory":
        return _pinned(*args)
    if PretendCuda.waiting_is_wrong and _waits(name, args, kwargs, bool(gpu)):
        raise RuntimeError(f"{name} waits for the device inside a recorded step")
    if gpu and name not in MAY_MEET and any(each.dim() for each in host):
        raise RuntimeError(f"tensors on cuda:0 and cpu meet in {name}")
    if gpu and _in_tf32(name):
        args = tuple(_rounded(each) for each in args)
    asked = [each for each in [kwargs.get("device"), *args] if _device(each) is not None]
    args = tuple(_stripped(each) for each in args)
    kwargs = {key: _stripped(each) for key, each in kwargs.items()}
    found = _plainly(func, args, kwargs)
    if name == "cpu":
        return _placed(found, False)
    if asked:
        return _placed(found, any(_device(each) == "cuda" for each in asked))
    return _placed(found, _is_gpu(args[0]) if name == "copy_" else bool(gpu))


def _in_tf32(name: str) -> bool:
    """Whether a GPU rounds this operation's float32 operands to TF32."""
    if name == "conv2d":
        return torch.backends.cudnn.allow_tf32
    return name in PRODUCTS and torch.backends.cuda.matmul.allow_tf32


def _rounded(value: Any) -> Any:
    """Return a float32 tensor with 10 bits of mantissa in place of 23; gradients pass unchanged."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    with torch._C.DisableTorchFunction():
        bits = (value.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
        return value + (bits.view(torch.float32) - value.detach())


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_gpu: bool) -> bool:
    if name in ("to", "cuda") and not on_gpu:
        sent = any(_device(each) == "cuda" for each in tree_iter((args, kwargs)))
        return sent and not (hasattr(args[0], "pinned") and kwargs.get("non_blocking"))
    if name == "__getitem__":
        return any(_is_gpu(each) and each.dtype is torch.bool for each in tree_iter(args[1]))
    return on_gpu and name in WAITS


def _pinned(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    found.pinned = True  # type: ignore[attr-defined]
    return found


def _is_gpu(value: Any) -> bool:
    return isinstance(value, CudaTensor)


def _device(value: Any) -> str | None:
    """Return the kind of device that an argument names, None for other arguments."""
    if isinstance(value, torch.device):
        return value.type
    return (
        value.partition(":")[0] if isinstance(value, str) and value[:4] in ("cuda", "cpu") else None
    )


def _stripped(value: Any) -> Any:
    return torch.device("cpu") if _device(value) == "cuda" else value


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _placed(found: Any, gpu: bool) -> Any:
    """Return results with the class of tensors on that device."""

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor) or _is_gpu(value) == gpu:
            return value
        return _plainly(Tensor.as_subclass, (value, CudaTensor if gpu else Tensor), {})

    return tree_map(place, found)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Any:
    """Return a deep copy; a parameter's is a parameter."""
    if id(tensor) not in memo:
        found = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            found = nn.Parameter(found, tensor.requires_grad)
        memo[id(tensor)] = found
    return memo[id(tensor)]
