"""Groups of images that belong together, such as the frames of one track: never parted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

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


def hold_out(
    targets: Sequence[int], groups: Sequence[str], share: float, order: Iterable[str]
) -> npt.NDArray[np.bool_]:
    """Return which images to set aside, bool `[N]`: whole groups, about `share` of every class.

    Of every class that has two groups one at least is set aside, if it has half of the class's
    images at most. A class never loses all of its images.

    Args:
        targets: the images' classes, `N`.
        groups: the images' groups, `N`.
        share: of each class's images, 0.5 at most.
        order: every group once; the first ones that fit are taken.
    """
    images = Counter(targets)
    classes: dict[str, Counter[int]] = defaultdict(Counter)
    for target, group in zip(targets, groups, strict=True):
        classes[group][target] += 1
    held: Counter[int] = Counter()
    taken = set()
    for group in order:
        if all(
            held[target] + count / 2 <= share * images[target]
            if held[target]
            else 2 * count <= images[target]
            for target, count in classes[group].items()
        ):
            taken.add(group)
            held += classes[group]
    return np.array([group in taken for group in groups], dtype=bool)
