"""Folders as they are: which files are images, and which are left out and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
APPLE = (".heic", ".heif")
HIDDEN = "hidden, or of the system"
SYSTEM = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot
PNG, JPEG, RIFF, WEBP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"WEBP"


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used.

    Args:
        path: of it.
        reason: for people.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class FoundImages:
    """The images under a folder.

    Args:
        paths: of the image files, sorted.
        left_out: every other file, and every folder that was not entered.
    """

    paths: list[Path]
    left_out: list[LeftOut]


def find_images(folder: Path) -> FoundImages:
    """Find the image files under `folder`, by suffix, or by content where they have none.

    HEIC files are images where the extra `heif` is installed.

    Links to folders are followed, but no folder is entered twice.
    """
    paths: list[Path] = []
    left_out: list[LeftOut] = []

    def refused(error: OSError) -> None:
        left_out.append(LeftOut(Path(error.filename), "a folder that cannot be read"))

    entered: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, onerror=refused, followlinks=True):
        here = Path(place)
        found = here.stat()
        if (found.st_dev, found.st_ino) in entered:
            folders.clear()
            left_out.append(LeftOut(here, "a link to a folder that is used already"))
            continue
        entered.add((found.st_dev, found.st_ino))
        left_out += [LeftOut(here / name, HIDDEN) for name in folders if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in files:
            if reason := _reason(here / name):
                left_out.append(LeftOut(here / name, reason))
            else:
                paths.append(here / name)
    return FoundImages(sorted(paths), sorted(left_out, key=lambda each: each.path))


def told(left_out: Sequence[LeftOut]) -> str:
    """Return how many files and folders are left out for each reason, as one line."""
    counts = Counter(each.reason for each in left_out).most_common()
    return f"not used: {', '.join(f'{count} {reason}' for reason, count in counts)}"


def is_hidden(name: str) -> bool:
    """Whether a name is one of a file manager, a notebook or a system: their copies and notes."""
    return name.startswith(".") or name in SYSTEM


def _reason(path: Path) -> str:
    """Return why a file is no image to use; empty where it is one."""
    suffix = path.suffix.lower()
    if is_hidden(path.name):
        return HIDDEN
    if not path.is_file():
        return "that links to nothing"
    if suffix in SUFFIXES:
        return ""
    if suffix in APPLE:
        if find_spec("pillow_heif") is not None:
            return ""
        return f"{suffix} (install dverge-serve[heif], or save them as JPEG or PNG)"
    if suffix:
        return f"{suffix} (not PNG, JPEG or WebP)"
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return "that cannot be read"
    if start.startswith((PNG, JPEG)) or (start.startswith(RIFF) and start[8:12] == WEBP):
        return ""
    return "without a suffix (not PNG, JPEG or WebP)"
