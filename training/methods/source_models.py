"""Source models: the networks whose adversarial images other networks learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder, canonical_json, sha256
from training.config import SOURCE_SEED, Config, Verification
from training.data.splits import TrainingData
from training.models.bn_folding import folded
from training.models.member import Member
from training.models.published_resnet import PublishedResNet
from training.models.resnet import family
from training.models.state_dict import network_sha256
from training.models.weights_file import WeightsFile
from training.runs.directory import Run
from training.schedules import Dverge, Transfer

Train = Callable[..., Run]  # `training.trainer.train`, which is above this module


@dataclass(frozen=True)
class SourceModel:
    """A frozen network.

    Args:
        name: for people.
        architecture: as recipes name it.
        network: in evaluation mode, on the CPU.
    """

    name: str
    architecture: str
    network: Member

    def to_json(self) -> dict[str, Any]:
        """Return its entry in a run's record and in the model's."""
        digest = network_sha256(folded(self.network))  # as verification knows its surrogates
        return {"name": self.name, "architecture": self.architecture, "sha256": digest}


def given_sources(config: Config, data: TrainingData) -> list[SourceModel]:
    """Return the networks that `transfer.sources` names; none where it names nothing.

    Raises:
        UserError: nothing there, a damaged file, or networks of other classes or another input.
    """
    named = config.transfer.sources
    paths = [Path(each) for each in ([named] if isinstance(named, str) else named) if each]
    return [model for path in paths for model in _read(path, config, data)]


def trained_sources(
    config: Config, data: TrainingData, device: torch.device, train: Train
) -> list[SourceModel]:
    """Return networks trained for this purpose, like surrogates but from seeds of their own.

    They are kept in the cache, for every run of the same settings and images.
    """
    wanted = sources_config(config)
    key = sha256(canonical_json([wanted.to_json(), data.train.sha256]))
    folder = cache_folder() / "sources" / key[:24]
    made = train(wanted, folder, device=device, resume=True, data=data, wait=True, surrogate=True)
    return list(_of_run(made))


def sources_config(config: Config) -> Config:
    """Return how sources are trained: a run's first stage, on its architecture and relatives."""
    own = list(dict.fromkeys(config.architectures))
    relatives = [other for each in own for other in family(each)]
    count = config.transfer.networks
    chosen = tuple(islice(cycle(dict.fromkeys([*own, *relatives])), count))
    return replace(
        config,
        name="sources",
        method="standard",
        architecture=chosen if count > 1 else chosen[0],
        members=count,
        seed=SOURCE_SEED + count,
        data=replace(config.data, path="", group="", test_limit=0, memory_gb=None, workers=None),
        start="",
        tensorboard=False,
        dverge=Dverge(),
        transfer=Transfer(),
        verification=Verification(),
    )


def _read(path: Path, config: Config, data: TrainingData) -> list[SourceModel]:
    if not path.is_dir():
        return list(_of_file(path, config, data))
    # Once each: `latest` is a link to another one.
    within = sorted({each.parent.resolve() for each in path.glob("*/checkpoint.json")})
    runs = [path] if Run(path).begun else within
    if not runs:
        raise UserError(f"no finished run in {path}", "a run, a folder of runs or a weights file")
    found: list[SourceModel] = []
    for each in runs:
        run = Run.open_finished(each)
        if run.labels != data.labels or run.preprocess.shape != config.data.preprocess.shape:
            raise UserError(
                f"the source {each} has {len(run.labels)} classes and takes "
                f"{list(run.preprocess.shape)}",
                f"the data's {len(data.labels)} and {list(config.data.preprocess.shape)}",
            )
        found += _of_run(run)
    return found


def _of_run(run: Run) -> Iterator[SourceModel]:
    for index, network in enumerate(run.members()):
        named = run.config.architectures[index]
        yield SourceModel(f"member {index} of {run.path.name}", named, network)


def _of_file(path: Path, config: Config, data: TrainingData) -> Iterator[SourceModel]:
    channels, classes = config.data.preprocess.shape[0], len(data.labels)
    for index, network in enumerate(WeightsFile.read(path).networks):
        kind = PublishedResNet.recognise(network, path)
        if (kind.channels, kind.classes) != (channels, classes):
            raise UserError(
                f"the source {path} reads {kind.channels} channels and has {kind.classes} classes",
                f"the data's {channels} and {classes}",
            )
        name = f"member {index} of {path.name}"
        yield SourceModel(name, kind.architecture, kind.member(network, path))
