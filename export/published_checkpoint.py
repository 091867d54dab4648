"""Published checkpoints: CIFAR ResNets in a weights file, as one ensemble.

Depth, width, kind of shortcut, channels and classes are read off the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError
from export.source import ExportSource, config_json, without_images
from training.config import Config
from training.models.member import Member
from training.models.published_resnet import PublishedResNet
from training.models.weights_file import WeightsFile
from training.recipe import load_recipe

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# How the files of docs/model-zoo.md were trained, which do not say so, by their sha256.
METHODS = {
    "88572ff0c30850b08b5f50109158de2a7ac524f48c99b57a1fb47ca32a8b3ef5": "standard",
    "5d331dec0b6d014057af7970c2f12529ec67092a7421619f330f6ab94a2fc6de": "dverge",
    "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8": "standard",
    "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850": "standard",
    "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367": "standard",
    "9ccdc6f04ce0f2d3be99826ec64fb2d568982732f3d6adda9537bc56a6bdef91": "dverge",
    "7c585703703781e07024cc184b323174145c3d022e59e0d51d0b60893c28a90f": "dverge",
}


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Args:
        members: in evaluation mode, on the CPU.
        sha256: of the file.
        resnet: what each of them is.
        method: how they were trained; empty where that is not known.
    """

    members: list[Member]
    sha256: str
    resnet: PublishedResNet
    method: str


def from_checkpoint(path: str | Path, labels: str | Path) -> ExportSource:
    """Read a published checkpoint, for `export`.

    Args:
        path: the file.
        labels: `cifar10`, or a text file with one class name a line.

    Raises:
        UserError: the file is not such a checkpoint, is damaged, or has another number of classes.
    """
    path, labels = Path(path), str(labels)
    found = read_published(path)
    names = read_labels(labels, found.resnet.classes)
    return as_source(path, found, names, dataset="cifar10" if labels == "cifar10" else "")


def as_source(
    path: Path,
    found: Published,
    labels: tuple[str, ...],
    *,
    dataset: str = "",
    crop: tuple[int, int] = (32, 32),
) -> ExportSource:
    """Return a published checkpoint as something to export.

    Args:
        path: of the file.
        found: what was read from it.
        labels: its classes in the order of its logits.
        dataset: the named data set of its images, if it is one.
        crop: height and width of its images in pixels.

    Raises:
        UserError: its images have neither one channel nor three.
    """
    channels = found.resnet.channels
    mode: Literal["L", "RGB"] | None = {1: "L", 3: "RGB"}.get(channels)  # type: ignore[assignment]
    if mode is None:
        raise UserError(f"{path} reads images of {channels} channels", "1 (gray) or 3 (RGB)")
    config = _config(path, found, {"data.mode": mode, "data.crop": list(crop)}, dataset)
    card = Card(
        name=config.name,
        labels=labels,
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
    file = WeightsFile.read(path)
    kinds = [PublishedResNet.recognise(each, path) for each in file.networks]
    members = [
        kind.member(network, path) for kind, network in zip(kinds, file.networks, strict=True)
    ]
    if len(set(kinds)) > 1:
        raise UserError(f"{path} holds members of different shapes", "members of one architecture")
    return Published(members, file.sha256, kinds[0], METHODS.get(file.sha256, ""))


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


def _config(path: Path, found: Published, images: dict[str, Any], dataset: str) -> Config:
    """Return the published recipe with what the file shows: the file itself says no more."""
    known = {
        "name": path.stem,
        "architecture": found.resnet.architecture,
        "width": found.resnet.width,
        "members": len(found.members),
        "method": found.method or ("dverge" if len(found.members) > 1 else "standard"),
        "data.name": dataset or "imagefolder",
        "data.mean": found.resnet.mean,
        "data.std": found.resnet.std,
    }
    return load_recipe("cifar10", known | images)
