"""Smoke checks of whole runs: every method, several processes, export and verification."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np
import torch

from benchmarks.gpu.smoke import needs_gpu
from benchmarks.gpu.tiny import METHODS, python, tiny_config
from dverge_serve.engine.providers import providers
from export import export
from training import train
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


@needs_gpu
def onnxruntime_on_cuda(device: torch.device) -> str:
    """ONNX Runtime finds its CUDA provider."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise SkipTest("this ONNX Runtime is built without CUDA")
    return str(providers("cuda"))


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
