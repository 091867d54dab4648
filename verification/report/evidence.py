"""The evidence: clean and adversarial images kept beside the report, for a replay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import psutil

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from training.data.splits import Split
from verification.attacks.perturbation import LARGEST_HALF_DELTA

IMAGES = "images.npz"
Arrays = dict[str, npt.NDArray[Any]]


def evidence_folder(model: Path) -> Path:
    """Return the folder of evidence about `model`: `model.onnx` has `model.report/`."""
    return model.with_name(f"{model.stem}.report")


class EvidenceWriter:
    """Writer of the evidence, into a temporary folder that `finish` renames.

    A context manager, at whose end a folder that was not renamed is deleted.

    Args:
        folder: the final folder.
        split: the clean images and labels; adversarial images are stored as changes of them.
        holdout: the clean images that calibrate the alarm.
    """

    def __init__(self, folder: Path, split: Split, holdout: Split) -> None:
        self.folder = folder
        self.part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        self._images = split.images.cpu().numpy()
        for left in folder.parent.glob(f".{folder.name}.*.part"):
            if not _alive(left):  # a run was killed
                shutil.rmtree(left, ignore_errors=True)
        (self.part / "adversarial").mkdir(parents=True)
        images = {
            "images": self._images,
            "labels": split.labels.cpu().numpy(),
            "holdout": holdout.images.cpu().numpy(),
        }
        self.index: dict[str, Any] = {
            "images": {"file": IMAGES, "sha256": self._write(IMAGES, images)},
            "adversarial": [],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.part, ignore_errors=True)

    def add(
        self,
        attack: str,
        eps: float,
        halves: npt.NDArray[np.float16],
        delivered: npt.NDArray[np.uint8],
    ) -> None:
        """Keep one attack's images at one radius.

        Args:
            attack: its name.
            eps: its radius.
            halves: changes of the float images.
            delivered: the 8-bit images; kept as int8 changes where those fit.
        """
        name = f"adversarial/{len(self.index['adversarial']):03d}.npz"
        steps = delivered.astype(np.int16) - self._images
        small = not steps.size or int(np.abs(steps).max()) <= LARGEST_HALF_DELTA
        found = {"delivered": steps.astype(np.int8) if small else steps, "float": halves}
        self.index["adversarial"].append(
            {"attack": attack, "eps": eps, "file": name, "sha256": self._write(name, found)}
        )

    def finish(self, plots: Mapping[str, bytes]) -> None:
        """Put the evidence, with the plots as PNG files, in place of any older one."""
        for name, data in plots.items():
            (self.part / f"{name}.png").write_bytes(data)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.part.replace(self.folder)

    def _write(self, name: str, arrays: Arrays) -> str:
        path = self.part / name
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        return sha256(path.read_bytes())


def _alive(part: Path) -> bool:
    """Return whether another process is still at work on a folder of evidence."""
    process = int(part.suffixes[-2][1:])
    return process != os.getpid() and psutil.pid_exists(process)


def read_evidence(folder: Path, entry: dict[str, Any]) -> Arrays:
    """Return the arrays of one entry of the index.

    Raises:
        UserError: the file is missing, or not the one the report names.
    """
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"no file {path}", "the images the report was made with") from error
    if sha256(data) != entry["sha256"]:
        raise UserError(f"{path} is not the file the report names", f"sha256 {entry['sha256']}")
    with np.load(path) as stored:
        return dict(stored)
