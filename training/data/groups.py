"""Groups of images that belong together, such as the frames of one track: never parted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dverge_serve.errors import UserError


def groups_by_name(files: Iterable[Path], folder: Path, pattern: str) -> dict[Path, str]:
    """Return each file's group: what the capture group of `pattern` finds in its name.

    Args:
        files: under the folder.
        folder: the names are the files' paths from here, with `/` between the folders.
        pattern: a regular expression with one capture group, searched anywhere in the name.

    Raises:
        UserError: it is not found in a file's name.
    """
    found = {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        match = re.search(pattern, name)
        if match is None or match[1] is None:
            raise UserError(
                f"data.group = {pattern}: not found in {name}", "a pattern that fits every file"
            )
        found[file] = match[1]
    return found
