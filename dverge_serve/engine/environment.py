"""The environment of a command: versions, processor, GPU and its libraries, disk and cache."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import onnxruntime as ort

from dverge_serve import __version__
from dverge_serve.cores import cores
from dverge_serve.engine.providers import CUDA, gpus
from dverge_serve.files import cache_folder
from dverge_serve.progress import gigabytes

PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "bentoml")
CPU_INFO = Path("/proc/cpuinfo")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
ASK_TORCH = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"built for CUDA {torch.version.cuda}, and finds no device")
print(torch.cuda.get_device_name())
"""
LITTLE_DISK = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One fact about the environment.

    Args:
        what: is described.
        found: there.
        advice: what follows for the user; empty where nothing does.
    """

    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class CacheUse:
    """What one part of the cache holds.

    Args:
        name: of the part, a folder of the cache.
        entries: in it.
        size: of all its files, in bytes.
    """

    name: str
    entries: int
    size: int


def examine() -> list[Finding]:
    """Return what a user or a maintainer asks first when something fails or is slow."""
    return [*software(), *_processor(), *_gpu(), *_disk()]


def cache_use() -> list[CacheUse]:
    """Return what each part of the cache holds: surrogates, attacks, downloaded data."""
    root = cache_folder()
    parts = sorted(each for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
    return [
        CacheUse(part.name, sum(1 for _ in part.iterdir()), folder_size(part)) for part in parts
    ]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder and below."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


def software() -> Iterator[Finding]:
    """Yield the versions that a bug report should have."""
    yield Finding("dverge", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()}")
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield Finding(name, metadata.version(name))
    if util.find_spec("torch") is None:
        advice = "train, export and verify-robustness need it: pip install 'dverge-serve[train]'"
        yield Finding("torch", "not installed", advice)


def _processor() -> Iterator[Finding]:
    count = cores()
    advice = "" if count > 1 else "training and attacks on one core take twice as long as on two"
    yield Finding("cores", f"{count} of {os.cpu_count()}", advice)
    try:
        text = CPU_INFO.read_text()
    except OSError:
        return
    flags = text.partition("flags")[2].partition("\n")[0].split()
    found = [name for name in INSTRUCTIONS if name in flags]
    bf16 = {"avx512_bf16", "amx_bf16"} & set(found)
    advice = "" if bf16 else "no bf16 arithmetic: training uses fp32, at about half the speed"
    yield Finding("instructions", ", ".join(found) or "none of those that matter", advice)


def _gpu() -> Iterator[Finding]:
    if not gpus():
        advice = "many images take hours; photographs and the recipes in -fast suit a CPU"
        yield Finding("GPU", "no NVIDIA GPU", advice)
        return
    yield Finding("GPU", f"NVIDIA, {gpus()} for this process")
    yield Finding("torch's CUDA", *_torch_cuda())
    yield Finding("ONNX Runtime's CUDA", *_onnxruntime_cuda())


def _torch_cuda() -> tuple[str, str]:
    if util.find_spec("torch") is None:
        return "torch is not installed", ""
    # In a process of its own: this package works without torch, and a broken driver may crash it.
    found = subprocess.run(
        [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, check=False
    )
    if found.returncode == 0:
        return found.stdout.strip(), ""
    reason = (found.stderr.strip().splitlines() or ["it crashed"])[-1]
    return reason, "training runs on the CPU; install a build of torch that fits the driver"


def _onnxruntime_cuda() -> tuple[str, str]:
    if CUDA not in ort.get_available_providers():
        return "no CUDA provider in this build", "pip install 'dverge-serve[gpu]'"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot load
        ort.preload_dlls()
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        # The provider's library asks the runtime's shared one for its host.
        ctypes.CDLL(str(library.with_name("libonnxruntime_providers_shared.so")))
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"cannot be loaded ({error})", "pip install 'dverge-serve[gpu]'; until then: the CPU"
    return "loads", ""


def _disk() -> Iterator[Finding]:
    for what, folder in (("disk", Path.cwd()), ("cache", cache_folder())):
        there = next(each for each in (folder, *folder.parents) if each.is_dir())
        free = shutil.disk_usage(there).free
        advice = "" if free >= LITTLE_DISK else "little is free: `dverge cache prune` may help"
        used = f"{gigabytes(sum(each.size for each in cache_use()))} in " if what == "cache" else ""
        yield Finding(what, f"{used}{folder}, {gigabytes(free)} free", advice)
