"""Smoke checks of whole runs: every method, several processes, export and verification."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import get_args
from unittest import SkipTest, mock

import numpy as np
import onnxruntime
import torch
from PIL import Image

from benchmarks.gpu.smoke import needs_gpu
from benchmarks.gpu.tiny import python, tiny_config
from dverge_serve.engine.card import FusionMode
from dverge_serve.engine.providers import PROVIDER, Device
from dverge_serve.engine.session import Engine
from export import export
from export.parity import check
from export.source import from_run
from training import train
from training.method_registry import METHODS
from verification import verify


@needs_gpu
def nccl_alone(device: torch.device) -> str:
    """Every collective that training uses, in a group of one."""
    return python("-c", "from benchmarks.gpu.runs import use_nccl as f; f()")


def use_nccl() -> None:
    """Broadcast and reduce over NCCL, and objects over Gloo."""
    import torch.distributed as dist

    torch.cuda.set_device(0)
    free_port = 0
    store = dist.TCPStore("127.0.0.1", free_port, 1, is_master=True)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.new_group([0], backend="nccl")
    tensor = torch.ones(5, device="cuda", dtype=torch.float64)
    assert isinstance(group, dist.ProcessGroup)
    waiting = dist.broadcast(tensor, 0, group, async_op=True)
    assert waiting is not None
    waiting.wait()
    dist.all_reduce(tensor, group=group)
    dist.broadcast_object_list([{"tensor": torch.ones(2)}], 0)
    torch.cuda.synchronize()
    dist.destroy_process_group()


def every_method_trains(device: torch.device) -> str:
    """A tiny run of each method, in fp32 and in whatever `auto` is here."""
    used = set()
    for precision in ("fp32", "auto"):
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                config = tiny_config(method=method, precision=precision)
                run = train(config, Path(folder, "run"), device=device)
                assert np.isfinite(run.checkpoint["holdout_accuracy"]), method
                used.add(run.checkpoint["provenance"]["precision"])
    return f"{len(METHODS)} methods in {' and '.join(sorted(used))}"


def two_processes_share_one_device(device: torch.device) -> str:
    """Two processes train together through Gloo."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "dverge_serve", "train", "--recipe", "digits", "--out", f"{folder}/run"]
        command += ["--device", device.type]
        for pair in ("width=8", "members=2", "standard.epochs=1", "dverge.epochs=1"):
            command += ["--set", pair]
        return python("-m", *command, "--set", "data.train_limit=200")


def images_are_read_during_training(device: torch.device) -> str:
    """A run on a folder of images that does not fit into memory."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for place in (Path(folder, split, name) for split in ("train", "test") for name in "ab"):
            place.mkdir(parents=True)
            for number in range(40):
                pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
        data = {"data.name": "imagefolder", "data.path": folder, "data.memory_gb": 0}
        run = train(tiny_config(**data), Path(folder, "run"), device=device)
        assert np.isfinite(run.checkpoint["holdout_accuracy"])
    return "80 images"


@needs_gpu
def onnxruntime_on_cuda(device: torch.device) -> str:
    """An exported file's answers under ONNX Runtime's CUDA provider are torch's."""
    return _answers_as_torch("cuda")


@needs_gpu
def onnxruntime_on_tensorrt(device: torch.device) -> str:
    """The same under TensorRT, whose libraries are in no extra of ours."""
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError as error:
        raise SkipTest(str(error)) from error
    return _answers_as_torch("tensorrt")


def _answers_as_torch(device: Device) -> str:
    if PROVIDER[device] not in onnxruntime.get_available_providers():
        raise SkipTest(f"this ONNX Runtime is built without {device}")
    told = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, DVERGE_CACHE=f"{folder}/cache"),
    ):
        source = from_run(train(tiny_config(), Path(folder, "run"), device="cpu"))
        for form in get_args(FusionMode):
            model = Path(folder, f"{form}.onnx")
            export(source, model, form=form, target="cpu")
            with Engine(model, device=device) as engine:
                parity = check(engine, source.ensemble, source.probe)
            assert parity.holds, f"{form}: {parity}"
            told.append(f"{form}: {parity}")
    return "; ".join(told)


@needs_gpu
def the_suites_own_gpu_tests(device: torch.device) -> str:
    """The tests that are skipped on machines without a GPU."""
    files = ["tests/training/parallel/test_cuda_graphs.py", "tests/training/test_trainer.py"]
    chosen = ["-k", "gpu or graph or recorded or rate or waits", "-W", "default"]
    return python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *chosen)


def verify_quick(device: torch.device) -> str:
    """Train, export and attack; the exported file runs on the CPU, gradients on the device."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, DVERGE_CACHE=f"{folder}/cache"),
    ):
        run = train(tiny_config(), Path(folder, "runs", "one"), device=device)
        other = tiny_config(method="standard", seed=7)
        train(other, Path(folder, "surrogates", "standard-2"), device=device)
        model = Path(folder, "model.onnx")
        export(run, model, form="grouped", target="cpu")
        surrogates = Path(folder, "surrogates")
        report = verify(model, run=run, surrogates=surrogates, images=8, eps=[0.1], device=device)
    gates = {gate.name: gate.passed for gate in report.gates}
    wanted = ("parity", "eps-8bit", "nonzero-gradient")
    assert all(gates[name] for name in wanted), gates
    return f"{', '.join(wanted)} passed"
