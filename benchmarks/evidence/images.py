"""The images and the checkpoint that the evidence uses, and where they are on this machine."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder

CIFAR10 = "cifar10-jpeg.tar.xz"
CHECKPOINT = "official_dverge_3xresnet20_eps0.07.pth"


def evidence_cache() -> Path:
    """Return where models, surrogates and unpacked images are kept between calls."""
    return cache_folder() / "evidence"


def overrides(recipe: str) -> dict[str, Any]:
    """Return what a recipe needs to find its images here: nothing for embedded ones.

    Raises:
        UserError: the copy of CIFAR-10 is not here.
    """
    if not recipe.startswith("cifar10"):
        return {}
    return {"data.name": "imagefolder", "data.path": str(_cifar10())}


def checkpoint() -> Path:
    """Return the published checkpoint.

    Raises:
        UserError: it is not here.
    """
    return _given(CHECKPOINT)


def _cifar10() -> Path:
    archive, folder = _given(CIFAR10), evidence_cache() / "cifar10-jpeg"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
            (train,) = Path(part).rglob("train")
            train.parent.rename(folder) if train.parent != Path(part) else _move(part, folder)
    return folder


def _move(part: str, folder: Path) -> None:
    whole = folder.with_name(f".{folder.name}.part")
    whole.mkdir(exist_ok=True)
    for item in Path(part).iterdir():
        item.rename(whole / item.name)
    whole.rename(folder)


def _given(name: str) -> Path:
    folder = os.environ.get("DVERGE_TEST_DATA")
    if not folder or not (path := Path(folder) / name).is_file():
        where = f"no {name} in {folder}" if folder else "DVERGE_TEST_DATA is not set"
        raise UserError(where, f"a folder that holds {name}")
    return path
