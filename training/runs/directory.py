"""The run directory: everything a training run leaves, whole at any moment."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from dverge_serve import __version__
from dverge_serve.errors import UserError
from dverge_serve.files import (
    atomic_path,
    canonical_json,
    pretty_json,
    read_json,
    sha256,
    write_atomic,
    write_error,
)
from dverge_serve.images import Preprocess
from training.config import Config, differences
from training.models.build import build_members
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.state_dict import load_members, members_tensors, parse
from training.runs import lock
from training.runs.latest import follow, name_latest

SCHEMA_VERSION = 1
PROBES = 16
UNFINISHED = ".*.part"  # what a kill in the middle of an atomic write leaves behind


@dataclass(frozen=True)
class Run:
    """A run directory.

    `config.json` every value used; `standard.safetensors` the members after stage one;
    `members.safetensors` the result; `checkpoint.json` written last, so that a directory with it
    is finished; `probe.npz` held-out images for parity checks; `metrics.jsonl` one line an epoch;
    `state.safetensors` what resuming needs, in one file so that it is never half of two states;
    `images.json` the hash of the images, and of starting weights from files, so that a run never
    goes on with others.

    Args:
        path: the directory.
        writes: False where another process writes what this one would.
    """

    path: Path
    writes: bool = True

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "writes", writes)

    @property
    def finished(self) -> bool:
        """Whether training ended and its result is complete."""
        return (self.path / "checkpoint.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether training was begun here."""
        return (self.path / "config.json").is_file()

    @property
    def in_use_or_killed(self) -> bool:
        """Whether a process trains here, or was killed while it did."""
        return (self.path / lock.NAME).exists()

    @classmethod
    def begin(cls, path: Path, config: Config, *, resume: bool) -> Run:
        """Open a directory for training: a new one, or with `resume` a begun one; it is checked."""
        cls.check(path, config, resume=resume)
        run = cls(follow(path))
        for part in run.path.glob(UNFINISHED):
            part.unlink(missing_ok=True)
        if not run.begun:
            write_atomic(run.path / "config.json", pretty_json(config.to_json()))
        name_latest(run.path)
        return run

    @classmethod
    def check(cls, path: Path, config: Config, *, resume: bool) -> None:
        """Refuse a directory that cannot be used for training; nothing is written.

        Raises:
            UserError: the directory is not empty and `resume` was not asked for, or its settings
                differ from `config`.
        """
        run = cls(follow(path))
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"{path} is a file", "a folder for the run")
        remains = {run.path / lock.NAME, *run.path.glob(UNFINISHED)}
        if not run.path.is_dir() or set(run.path.iterdir()) <= remains:
            return
        if not resume:
            raise UserError(
                f"{path} is not empty", "a new folder", "use `resume` to go on, or another `out`"
            )
        if not run.begun:
            raise UserError(f"{path} holds no run", "a folder that `dverge train` made")
        if odd := differences(run.config, config):
            raise UserError(
                f"{path} was begun with other settings of {', '.join(odd)}",
                "the settings it was begun with",
                "give those, or another `out`",
            )

    def locked(self, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from training here, see `training.runs.lock`."""
        return lock.locked(self.path, wait=wait)

    def keep_to(self, images_sha256: str, start_sha256: str = "") -> None:
        """Record the images and starting weights of a new run; refuse others when it is resumed.

        Raises:
            UserError: the images or the starting weights changed in between.
        """
        path = self.path / "images.json"
        note = {"images_sha256": images_sha256, "start_sha256": start_sha256}
        note = {key: value for key, value in note.items() if value}
        if not path.is_file():
            write_atomic(path, pretty_json(note))
            return
        noted = read_json(path, "the hash of the run's images")
        if noted != note:
            same = noted.get("images_sha256") == images_sha256
            what = "starting weights" if same else "training images"
            raise UserError(
                f"the {what} changed since {self.path} was begun",
                "those it was begun with",
                "restore them, or train into another `out`",
            )

    @classmethod
    def open_finished(cls, path: str | Path) -> Run:
        """Open a finished run for reading; `runs/latest` may be a link or a text file naming it.

        Raises:
            UserError: no run there, or it is not finished.
        """
        path = follow(path)
        run = cls(path)
        if not run.begun:
            raise UserError(
                f"no run at {path}",
                "a folder that `dverge train` made",
                "train first, or give another `run`",
            )
        if not run.finished:
            raise UserError(
                f"the run {path} is not finished",
                "a finished run",
                f"go on with `dverge train --resume --out {path}`",
            )
        if (version := run.checkpoint.get("schema_version")) != SCHEMA_VERSION:
            raise UserError(f"{path} has run schema version {version}", f"version {SCHEMA_VERSION}")
        return run

    @property
    def config(self) -> Config:
        """The settings this run was begun with."""
        table = read_json(self.path / "config.json", "a run's configuration")
        return Config.from_json(table, str(self.path / "config.json"))

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What `checkpoint.json` says of the finished run: hashes, labels, provenance."""
        found: dict[str, Any] = read_json(self.path / "checkpoint.json", "a run's checkpoint")
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order."""
        return tuple(self.checkpoint["labels"])

    @property
    def preprocess(self) -> Preprocess:
        """How images become this run's input."""
        return Preprocess.from_json(self.checkpoint["preprocess"])

    @property
    def weights_sha256(self) -> str:
        """Hash of `members.safetensors`, which models exported from this run carry."""
        return str(self.checkpoint["members_sha256"])

    def probe(self) -> Tensor:
        """Return held-out images, uint8 `[16, C, H, W]` or fewer."""
        path = self.path / "probe.npz"
        try:
            with np.load(io.BytesIO(path.read_bytes())) as stored:
                return torch.from_numpy(stored["images"])
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"cannot read {path} ({error})", "the run's probe images") from error

    def members(self, which: str = "members") -> list[Member]:
        """Load the finished members, or the `standard` ones after stage one, in evaluation mode.

        Raises:
            UserError: the file is missing, damaged, or not the one the checkpoint names.
        """
        path = self.path / f"{which}.safetensors"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}", "the run's weights") from error
        if sha256(data) != self.checkpoint[f"{which}_sha256"]:
            raise UserError(
                f"{path} is not the file this run was finished with",
                "the sha256 that checkpoint.json names",
                "restore it or train again",
            )
        classes, channels = len(self.labels), self.preprocess.shape[0]
        members = build_members(self.config, classes, [0.0] * channels, [1.0] * channels)
        load_members(members, parse(data, path), str(path))
        for member in members:
            member.eval().requires_grad_(False)
        return members

    def ensemble(self, which: str = "members") -> Ensemble:
        """Return `members` as one network, from images in `[0,1]` to the mean of their logits."""
        return Ensemble(self.members(which)).eval()

    def save_members(self, members: Sequence[Member], which: str) -> str:
        """Write the members' tensors and return the file's sha256."""
        # No metadata: safetensors writes it in random order, and equal runs are equal bytes.
        data = save_tensors(members_tensors(members))
        self._write(f"{which}.safetensors", data)
        return sha256(data)

    def save_probe(self, images: Tensor) -> None:
        """Write the first images of the held-out part for parity checks."""
        with atomic_path(self.path / "probe.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, images=images[:PROBES].cpu().numpy())

    def save_state(self, stage: int, epoch: int, tensors: dict[str, Tensor]) -> None:
        """Write what resuming needs: `epoch` epochs of `stage` are done."""
        position = torch.tensor([SCHEMA_VERSION, stage, epoch])
        self._write("state.safetensors", save_tensors({**tensors, "position": position}))

    def load_state(self) -> tuple[int, int, dict[str, Tensor]] | None:
        """Return stage, epochs done in it and tensors of the last saved state, if there is one."""
        path = self.path / "state.safetensors"
        if not path.is_file():
            return None
        tensors = parse(path.read_bytes(), path)
        if "position" not in tensors:
            raise UserError(f"{path} is damaged (it has no position)", "the state of a run")
        version, stage, epoch = tensors.pop("position").tolist()
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has version {version}", f"version {SCHEMA_VERSION}")
        return stage, epoch, tensors

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        try:
            with path.open("ab") as file:
                file.write(canonical_json(record) + b"\n")
        except OSError as error:
            raise write_error(path, error) from error

    def drop_metrics_after(self, stage: str, epochs: int, earlier: Sequence[str]) -> None:
        """Drop the lines of `metrics.jsonl` for epochs that a resumed run will run again."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.is_file():
            return
        kept = []
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a line cut short by a kill
                record = json.loads(line)
                known = record["stage"] == stage and record["epoch"] <= epochs
                if known or record["stage"] in earlier:
                    kept.append(line + b"\n")
        write_atomic(path, b"".join(kept))

    def finish(self, checkpoint: dict[str, Any]) -> None:
        """Write `checkpoint.json`, after which the run counts as finished."""
        record = {"schema_version": SCHEMA_VERSION, "tool_version": __version__, **checkpoint}
        write_atomic(self.path / "checkpoint.json", pretty_json(record))
        for name in ("state.safetensors", "images.json", "sources.npy", "sources.json"):
            (self.path / name).unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        if self.writes:
            write_atomic(self.path / name, data)
