"""Smoke checks of recorded steps: CUDA graphs, their streams and their draws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.gpu.smoke import needs_gpu
from benchmarks.gpu.steps import Stepper, Way, random_batch
from benchmarks.gpu.tiny import python, random_split, tiny_config
from dverge_serve.errors import UserError
from training.data.splits import TrainingData, load_training
from training.method_registry import METHODS
from training.methods import epoch_batches, stages
from training.methods.stored_images import StoredImages
from training.optimizers import RateOnDevice
from training.parallel.cuda_graphs import WARM_UPS, CudaRecorder, Recorded
from training.recipe import load_recipe
from training.trainer import prepare

LAYER, BATCH = 20, 128


def _recorded(side: str, device: torch.device) -> str:
    """Record the step of a side of `benchmarks.train_step`, and replay it."""
    before = torch.cuda.mem_get_info()[0]
    stepper = Stepper(Way(side=side, recorded=True), BATCH, device)
    images = random_batch(BATCH, device)
    first = stepper.ready(images, LAYER)
    replay = sum(stepper.seconds(images, LAYER) for _ in range(10)) / 10
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "left on another stream"
    assert bool(stepper.step(images, LAYER).isfinite().all())
    taken = (before - torch.cuda.mem_get_info()[0]) / 2**20
    return f"ready after {first:.2f} s, replay {replay * 1e3:.2f} ms, {taken:.0f} MiB"


@needs_gpu
def recorded_bf16_batch(device: torch.device) -> str:
    """In bf16, with the batch's statistics."""
    return _recorded("letter", device)


@needs_gpu
def recorded_bf16_running(device: torch.device) -> str:
    """In bf16, with running statistics: the default."""
    return _recorded("product", device)


@needs_gpu
def recorded_fp32_batch(device: torch.device) -> str:
    """In fp32, with the batch's statistics."""
    return _recorded("letter_fp32", device)


@needs_gpu
def a_failed_recording_ends_in_one_line(device: torch.device) -> str:
    """It is told as an error of the environment, and the current stream is the one before it."""
    return python("-c", "from benchmarks.gpu.recording import fail_to_record as f; f()")


def fail_to_record() -> None:
    """Record a step that waits for the GPU, which cannot be recorded."""
    device = torch.device("cuda")
    weight = nn.Parameter(torch.ones(4, device=device))
    optimizer = RateOnDevice([weight], lr=0.1, momentum=0.9, weight_decay=0.0)

    def work(layer: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        loss = (weight * inputs[0].mean()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        optimizer.step()
        return [loss.detach()]

    step = Recorded(work, [optimizer], 4, CudaRecorder(device, 1))
    try:
        for _ in range(WARM_UPS + 1):
            step(1, [torch.rand(4, 8, device=device)])
    except UserError as error:
        print(error)
    else:
        raise AssertionError("a step that waits for the GPU was recorded")
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "left on another stream"


@needs_gpu
def dropout_is_recorded(device: torch.device) -> str:
    """Each replay drops other values: with a learning rate of 0 every loss is another."""
    config = load_recipe(
        "images",
        {"architecture": "torchvision:mobilenet_v3_small", "data.crop": [64, 64], "batch_size": 16}
        | {"data.mean": [0.5] * 3, "data.std": [0.5] * 3},
    )
    split = random_split(16)
    members, optimizers = prepare(config, TrainingData(tuple("0123456789"), split, split), device)
    step = stages(config, members, optimizers)[0].step
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    x, labels = torch.rand(16, 3, 64, 64, device=device), split.labels.to(device)
    losses = [float(step(0, number, (x, labels, x))[0]) for number in range(WARM_UPS + 5)]
    assert len(set(losses[-4:])) == 4, f"the same values are dropped at every replay: {losses}"
    return f"{len(losses)} steps"


@needs_gpu
def steps_do_not_wait(device: torch.device) -> str:
    """Count how often a step of each method waits for the GPU; those of DVERGE never do."""
    waits = {}
    for method in METHODS:
        config = tiny_config(method=method)
        data = load_training(config.data)
        members, optimizers = prepare(config, data, device)
        stored = StoredImages.stand_in(config, data)
        stage = stages(config, members, optimizers, stored=stored)[-1]
        batch = next(epoch_batches(data.train.to(device), config, stage, 0))
        for _ in range(WARM_UPS + 2):
            stage.step(0, 0, batch)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            stage.step(0, 0, batch)
            torch.cuda.set_sync_debug_mode("default")
        # The mode itself warns once, that it is a prototype.
        waits[method] = sum("called a synchronizing" in str(each.message) for each in seen)
    assert waits["dverge"] == 0, waits
    return str(waits)
