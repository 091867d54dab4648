"""Run directories as files that travel, one for each run."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from dverge_serve.errors import UserError
from dverge_serve.files import write_atomic

LARGEST = 16_000_000
CHECKPOINT = "checkpoint.json"
DERIVED = "standard.safetensors"  # of a method that ends with stage one: the members once more


def keep(run: Path, file: Path) -> int:
    """Write a run directory into one file, whole, though another process may be training in it.

    The checkpoint is looked at first and last: a run that finished in between is read again.

    Returns:
        its bytes.

    Raises:
        UserError: more than may travel.
    """
    while True:
        finished = (run / CHECKPOINT).is_file()
        try:
            content = {
                path.name: path.read_bytes()
                for path in sorted(run.iterdir())
                if path.is_file() and not path.name.startswith(".")
            }
        except FileNotFoundError:
            continue
        if (run / CHECKPOINT).is_file() == finished:
            break
    if finished and _twice(content[CHECKPOINT]):
        content.pop(DERIVED, None)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    if len(data) > LARGEST:
        raise UserError(f"{run} takes {len(data)} bytes", f"at most {LARGEST}")
    write_atomic(file, data)
    return len(data)


def restore(file: Path, run: Path) -> None:
    """Bring a run directory back.

    Raises:
        UserError: a damaged file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                write_atomic(run / Path(name).name, archive.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {file} ({error})", "a file that a chunk returned") from error


def _twice(checkpoint: bytes) -> bool:
    found = json.loads(checkpoint)
    return bool(found["members_sha256"] == found["standard_sha256"])
