"""What is exported: an ensemble, its card, and images to check the file on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from training.config import Config
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.runs.directory import Run

Which = Literal["members", "standard"]
PROBES = 16
SEED = 20200930  # of synthetic probe images


@dataclass(frozen=True)
class ExportSource:
    """An ensemble to export: of a run, a published checkpoint, or a list of members.

    Args:
        ensemble: in evaluation mode, on the CPU.
        card: of the file to be, but for its form and precision.
        probe: held-out images, uint8 `[N, channels, height, width]`.
        config: the settings of their training, which name the images int8 is calibrated on.
        trained: what a run recorded of its training (`checkpoint.json`); empty for other members.
    """

    ensemble: Ensemble
    card: Card
    probe: npt.NDArray[np.uint8]
    config: Config
    trained: dict[str, Any] = field(default_factory=dict)


def from_run(run: Run, which: Which = "members") -> ExportSource:
    """Return a finished run's members, or its `standard` ones after stage one.

    Raises:
        UserError: the run's weights are damaged.
    """
    config, checkpoint = run.config, run.checkpoint
    training = config_json(config)
    training["method"] = config.method if which == "members" else "standard"
    if which == "members" and (models := checkpoint.get("sources")):
        training["source_models"] = models
    card = Card(
        name=config.name if which == "members" else f"{config.name}-standard",
        labels=run.labels,
        preprocess=run.preprocess,
        channel_order=run.preprocess.mode,
        members=config.members,
        dataset=config.data.name,
        training=training | {"train_sha256": checkpoint["train_sha256"]},
        weights_sha256=checkpoint[f"{which}_sha256"],
        tool_version=__version__,
    )
    probe = run.probe().numpy()
    return ExportSource(Ensemble(run.members(which)), card, probe, config, checkpoint)


def without_images(members: Sequence[Member], card: Card, config: Config) -> ExportSource:
    """Return members that came with no images: parity is checked on noise; the card says so."""
    probe = noise(card.input_shape, PROBES)
    return ExportSource(Ensemble(members), replace(card, probe="synthetic"), probe, config)


def noise(shape: tuple[int, int, int], count: int) -> npt.NDArray[np.uint8]:
    """Return `count` images of noise, always the same."""
    return np.random.default_rng(SEED).integers(0, 256, (count, *shape), dtype=np.uint8)


def config_json(config: Config) -> dict[str, Any]:
    """Return the settings as a model file carries them: without paths of this machine."""
    table = config.to_json()
    for key in ("path", "memory_gb", "workers"):  # settings of this machine, not of the model
        table["data"].pop(key)
    table.pop("start")  # more paths
    table["transfer"].pop("sources")
    table.pop("tensorboard")
    return table
