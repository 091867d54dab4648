"""Checkpoints of the paper's published code: a pickle of one state dictionary for each member.

Nothing but tensors is unpickled. Depth, width, channels and classes are read off the tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from export.source import ExportSource, config_json, without_images
from training.config import Config
from training.models.member import Member
from training.models.pretrained import PICKLES
from training.models.resnet import BlockMiddle, resnet_stages
from training.models.state_dict import fit
from training.recipe import load_recipe

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIZE = 32  # pixels a side: the published networks end in an 8x8 average, after two halvings
# What the published code normalises with, for files that do not carry it.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
EXPECTED = "a checkpoint of the published DVERGE code: {'model0': state dictionary, ...}"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Args:
        members: in evaluation mode, on the CPU.
        sha256: of the file.
        architecture, width, channels, classes: as inferred.
        mean, std: per channel; the file's own, or the published code's.
    """

    members: list[Member]
    sha256: str
    architecture: str
    width: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def from_checkpoint(path: str | Path, labels: str | Path) -> ExportSource:
    """Read a published checkpoint, for `export`.

    Args:
        path: the `.pth` file.
        labels: `cifar10`, or a text file with one class name a line.

    Raises:
        UserError: the file is not such a checkpoint, is damaged, or has another number of classes.
    """
    path, labels = Path(path), str(labels)
    found = read_published(path)
    names = read_labels(labels, found.classes)
    mode = {1: "L", 3: "RGB"}.get(found.channels)
    if mode is None:
        raise UserError(f"{path} reads images of {found.channels} channels", "1 (gray) or 3 (RGB)")
    config = _config(path, found, mode, labels)
    card = Card(
        name=config.name,
        labels=names,
        preprocess=config.data.preprocess,
        channel_order=mode,
        members=len(found.members),
        dataset=config.data.name,
        training=config_json(config),
        source="published-checkpoint",
        weights_sha256=found.sha256,
        tool_version=__version__,
    )
    return without_images(found.members, card, config)


def read_published(path: Path) -> Published:
    """Read a checkpoint's members.

    Raises:
        UserError: what was found instead, in one line.
    """
    table, digest = _load(path)
    states = _states(table, path)
    firsts = [_plain(state, path, index) for index, state in enumerate(states)]
    members, kinds = [], []
    for index, (tensors, mean, std) in enumerate(firsts):
        stages, kind = _architecture(tensors, path, index)
        member = Member(stages, mean, std)
        fit(
            member,
            tensors,
            file=str(path),
            who=f"model{index}",
            expected="the tensors of a CIFAR ResNet",
            names={ours: _published_name(ours, member) for ours in member.state_dict()},
            optional=("mean", "std"),
        )
        members.append(member.eval().requires_grad_(False))
        kinds.append((kind, mean, std))
    if len(set(kinds)) > 1:
        raise UserError(f"{path} holds members of different shapes", "members of one architecture")
    (architecture, width, channels, classes), mean, std = kinds[0]
    return Published(members, digest, architecture, width, channels, classes, mean, std)


def read_labels(labels: str, classes: int | None = None) -> tuple[str, ...]:
    """Return the class names: `cifar10`, or a file with one a line.

    Args:
        labels: which.
        classes: how many there must be, where that is known.

    Raises:
        UserError: no such file, or another number of classes.
    """
    if labels == "cifar10":
        names: tuple[str, ...] = CIFAR10
    else:
        try:
            text = Path(labels).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read labels from {labels}", "cifar10, or a text file with one class a line"
            ) from error
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(set(names)) != (classes or len(names)) or len(names) != len(set(names)):
        raise UserError(
            f"{labels} names {len(set(names))} different classes on {len(names)} lines",
            f"{classes}, as the weights have" if classes else "one a line",
        )
    return names


def _load(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", EXPECTED) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles' storage classes
            table = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged pickles surface as almost any exception; a foreign one as a refusal to unpickle.
    except Exception as error:
        raise UserError(f"{path} {_fault(data, str(error))}", EXPECTED) from error
    if not isinstance(table, Mapping):
        raise UserError(f"{path} holds a {type(table).__name__}", EXPECTED)
    return table, sha256(data)


def _fault(data: bytes, error: str) -> str:
    """Return why a file was not unpickled; torch's own text is long and speaks of its options."""
    if not data.startswith(PICKLES):
        return "is no file of torch.save"
    if found := re.search(r"GLOBAL (\S+)", error):
        return f"holds an object of {found[1]}, and only tensors are unpickled"
    return "is damaged, or not of torch.save"


def _states(table: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """Return the members' state dictionaries in order."""
    numbered = {}
    for key, state in table.items():
        match = re.fullmatch(r"model_?(\d+)", str(key))
        if match and isinstance(state, Mapping):
            if int(match[1]) in numbered:
                raise UserError(f"{path} holds model{match[1]} and model_{match[1]}", "one of them")
            numbered[int(match[1])] = state
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        keys = ", ".join(str(key) for key in list(table)[:6]) or "nothing"
        raise UserError(f"{path} holds {keys}", EXPECTED)
    return [numbered[index] for index in sorted(numbered)]


def _plain(
    state: Mapping[str, Any], path: Path, index: int
) -> tuple[Tensors, tuple[float, ...], tuple[float, ...]]:
    """Return a member's tensors without the wrappers' prefixes, and its normalisation."""
    tensors: Tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: '{name}' of model{index} is a {type(value).__name__}", "a tensor"
            )
        tensors[re.sub(r"^(module\.)*(model\.)?(module\.)*", "", str(name))] = value
    mean, std = tensors.pop("normalizer.mean", None), tensors.pop("normalizer.std", None)
    if mean is None or std is None:
        return tensors, MEAN, STD
    if not bool(((std > 0) & mean.isfinite() & std.isfinite()).all()):
        raise UserError(f"{path}: the normalisation of model{index}", "finite, and std above 0")
    return tensors, _floats(mean), _floats(std)


def _floats(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())


def _architecture(
    tensors: Tensors, path: Path, index: int
) -> tuple[list[torch.nn.Module], tuple[str, int, int, int]]:
    """Return the stages that these tensors fit, and architecture, width, channels and classes."""
    blocks = [
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{third}.")})
        for third in (1, 2, 3)
    ]
    first, last = tensors.get("conv1.weight"), tensors.get("fc.weight")
    whole = first is not None and last is not None and first.ndim == 4 and last.ndim == 2
    if not whole or not blocks[0] or len(set(blocks)) > 1 or "layer4.0.conv1.weight" in tensors:
        raise UserError(
            f"{path}: model{index} has {len(tensors)} tensors in thirds of {blocks} blocks",
            "a CIFAR ResNet: conv1, layer1 to layer3 of equally many blocks, fc",
        )
    assert first is not None
    assert last is not None
    (width, channels), classes = first.shape[:2], len(last)
    if "layer1.0.conv3.weight" in tensors:
        architecture = f"resnet{9 * blocks[0] + 2}-bottleneck"
    else:
        architecture = f"resnet{6 * blocks[0] + 2}"
    stages = resnet_stages(architecture, channels, width, classes)
    return stages, (architecture, width, channels, classes)


def _published_name(ours: str, member: Member) -> str:
    """Return how the published code calls one of our tensors."""
    if not ours.startswith("stages."):
        return ours
    _, at, part, *rest = ours.split(".")
    stage, last = int(at), len(member.stages) - 1
    if stage == 0:
        return ".".join(["conv1" if part == "conv" else "bn1", *rest])
    if stage == last:
        return ".".join(["fc", *rest])
    parts = 3 if any(isinstance(each, BlockMiddle) for each in member.stages) else 2
    block, within = divmod(stage - 1, parts)
    third, number = divmod(block, (last - 1) // parts // 3)
    names = {"conv": f"conv{within + 1}", "norm": f"bn{within + 1}", "shortcut": "downsample"}
    return ".".join([f"layer{third + 1}", str(number), names[part], *rest])


def _config(path: Path, found: Published, mode: str, labels: str) -> Config:
    """Return the published recipe with what the file shows: the file itself says no more."""
    known = {
        "name": path.stem,
        "architecture": found.architecture,
        "width": found.width,
        "members": len(found.members),
        "method": "dverge" if len(found.members) > 1 else "standard",
        "data.mode": mode,
        "data.mean": found.mean,
        "data.std": found.std,
    }
    if labels != "cifar10":
        known |= {"data.name": "imagefolder"}
    return load_recipe("cifar10", known)
