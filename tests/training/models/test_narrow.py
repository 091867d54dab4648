"""Narrow networks on CPUs without AVX-512, where channels-last kernels corrupt the heap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from training.models.resnet import NarrowShortcut, resnet_stages

TRAIN = """
import sys, tempfile, torch
from pathlib import Path
from training.recipe import load_recipe
from training.trainer import train
settings = {"standard.epochs": 6, "dverge.epochs": 2, "data.train_limit": 320, "batch_size": 64,
            "precision": "fp32"}
for width in (2, 4, 6):
    print("width", width, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = load_recipe("digits", settings | {"width": width})
        train(config, Path(folder) / "run", device=torch.device("cpu"))
"""


def test_narrow_ensembles_train_without_avx512() -> None:
    """In a process of its own: the fault aborts it (torch's kernels are chosen once a process)."""
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        env=os.environ | older,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("inside", [1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_narrow_shortcut_is_an_ordinary_convolution(
    inside: int, layout: torch.memory_format
) -> None:
    narrow = NarrowShortcut(inside, 8, 1, 2, bias=False)
    plain = nn.Conv2d(inside, 8, 1, 2, bias=False)
    plain.load_state_dict(narrow.state_dict())
    images = torch.rand(3, inside, 8, 8)
    found = narrow.to(memory_format=layout)(images.contiguous(memory_format=layout))
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain(images))


def test_only_narrow_strided_shortcuts_are_special() -> None:
    def special(architecture: str, width: int) -> int:
        stages = resnet_stages(architecture, 3, width, 10)
        modules = [module for stage in stages for module in stage.modules()]
        return sum(isinstance(module, NarrowShortcut) for module in modules)

    assert special("resnet8", 4) == 1
    assert special("resnet8", 8) == 0
    assert special("resnet11-bottleneck", 1) == 1
