"""The benchmark's baseline is the same procedure: otherwise its ratio would compare two things."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import published_step
from tests.training.networks import DEPTH, tiny_images, tiny_members
from training.methods import dverge
from training.schedules import Dverge


@pytest.mark.parametrize("layer", [1, 4, DEPTH])
def test_the_baseline_takes_the_same_step(layer: int) -> None:
    source, target, labels = tiny_images(6), tiny_images(6, seed=1), torch.arange(6) % 4
    settings = Dverge(batchnorm="batch", steps=4)
    sides = [tiny_members(3), tiny_members(3)]
    steps: list[Callable[..., object]] = [published_step.step, dverge.step]
    for members, step in zip(sides, steps, strict=True):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in members]
        step(members, optimizers, source, labels, target, layer=layer, settings=settings)
    for one, other in zip(*sides, strict=True):
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=1e-8)


def test_it_runs_and_ends_with_the_json_of_the_contract() -> None:
    command = [sys.executable, "-m", "benchmarks.train_step", "--layers", "1", "--batch", "16"]
    done = subprocess.run(
        [*command, "--json"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"machine", "rows", "bars", "skipped"} == set(report)
    assert report["rows"][0]["x_product"] > 0
