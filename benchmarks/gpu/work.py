"""The process that does one job; it ends with the process that started it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job, Plan, job_named
from dverge_serve.errors import UserError

PACKAGES = ("torch", "torchvision", "triton", "onnx", "scikit-learn", "numpy", "safetensors")
REPOSITORY = Path(__file__).parents[2]


def do(name: str, work: Path) -> None:
    """Do a job of the plan in `work`, going on where an earlier process stopped."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from training.device import pick_device

    plan, job = Plan.read(work), job_named(name)
    device = pick_device(plan.device)
    plan.find("machine", machine())
    if job.kind == "checks":
        _checks(plan, job)
    elif job.kind == "steps":
        from benchmarks.gpu.steps import measure

        measure(plan, name, device)
    elif job.kind == "attack":
        from benchmarks.gpu import attack

        attack.measure(plan, job, device)
    else:
        _train(plan, job, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """Return what figures depend on: hardware, driver, versions."""
    import torch

    from benchmarks import bench

    found = bench.machine() | {"versions": {name: bench.version(name) for name in PACKAGES}}
    if torch.cuda.is_available():
        of = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": of.name,
            "memory_bytes": of.total_memory,
            "multiprocessors": of.multi_processor_count,
            "capability": f"{of.major}.{of.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    return found


def _train(plan: Plan, job: Job, device: Any) -> None:
    from training import trainer as train
    from training.data.splits import load_training

    config = plan.config(job)
    train.SAVE_EVERY_S = plan.save_s
    data = load_training(plan.data(config))
    train.train(config, plan.run(job.name), device=device, resume=True, data=data)


def _checks(plan: Plan, job: Job) -> None:
    """Run the tests that need a GPU: recorded steps against eager ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/training/parallel/test_cuda_graphs.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout + done.stderr).splitlines()[-30:]
    plan.find(job.name, {"code": done.returncode, "said": said, "done": True})


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() or platform.release()


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open, and stop like a kill."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would spoil an ordinary end
        pass
    os._exit(UserError.exit_code)
