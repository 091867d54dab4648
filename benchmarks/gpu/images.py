"""The images as one file that travels: the folder's own JPEGs, decoded where they arrive."""

from __future__ import annotations

import tarfile
from pathlib import Path

from dverge_serve.errors import UserError
from dverge_serve.files import atomic_path, sha256
from dverge_serve.images import SUFFIXES

LARGEST = 60_000_000
PARTS = ("train", "test")


def pack(folder: Path, file: Path) -> int:
    """Write `folder/train/<class>/` and `folder/test/<class>/` into one file; return its bytes.

    Equal images give equal bytes.

    Raises:
        UserError: no images there, or more than may travel.
    """
    found = [
        path
        for part in PARTS
        for path in sorted((folder / part).glob("*/*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(f"no images in {folder}", "train/<class>/ and test/<class>/")
    with atomic_path(file) as part_file, tarfile.open(part_file, "w:xz") as archive:
        for path in found:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as content:
                archive.addfile(entry, content)
    size = file.stat().st_size
    if size > LARGEST:
        file.unlink()
        raise UserError(f"{size / 1e6:.0f} MB of images", f"at most {LARGEST / 1e6:.0f} MB")
    return size


def unpack(file: Path, folder: Path) -> None:
    """Bring the images back into `folder`, unless they are there already.

    Raises:
        UserError: no such file, or a damaged one.
    """
    done = folder / ".unpacked"
    try:
        name = sha256(file.read_bytes())
        if done.is_file() and done.read_text() == name:
            return
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"cannot read {file} ({error})", "a file that `pack` wrote") from error
    done.write_text(name)
