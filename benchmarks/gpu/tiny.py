"""What the smoke checks work on, and how they run Python beside themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from training.config import Config
from training.data.splits import Split
from training.models.build import build_members
from training.models.member import Member
from training.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def untrained_members(architecture: str = "resnet20") -> list[Member]:
    """Return members as the recipe `cifar10` starts them, in evaluation mode."""
    config = load_recipe("cifar10", {"architecture": architecture})
    made = build_members(config, 10, config.data.mean, config.data.std)
    return [member.eval() for member in made]


def random_split(count: int) -> Split:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.arange(count) % 10)


def tiny_config(**changes: Any) -> Config:
    """Return the settings of a run of about a second, every stage one epoch."""
    epochs = dict.fromkeys(["standard", "dverge", "adversarial", "adp", "gal"], 1)
    small: dict[str, Any] = {"width": 8, "members": 2, "batch_size": 16, "data.train_limit": 100}
    small |= {"dverge.average": 0.5}
    return load_recipe(
        "digits", small | {f"{stage}.epochs": count for stage, count in epochs.items()} | changes
    )


def python(*arguments: str) -> str:
    """Run Python in the repository's root; return the last line it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
    last = (said.splitlines() or [""])[-1]
    assert done.returncode == 0, last
    return last
