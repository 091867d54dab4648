"""A labelled folder of images, or a CSV file: its classes, its parts, and what is left out."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.image_folder import HIDDEN, LeftOut, find_images, is_hidden, told
from training.data.groups import groups_by_name
from training.data.holdout import whole_groups

TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that is there is the test set
TEST_SHARE = 0.2  # of each class, where the folder has no parts
Classes = dict[str, list[Path]]


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a data set.

    Args:
        root: the folder, or the CSV file.
        train, test: each class's files, classes sorted by name.
        left_out: files and folders that are not used.
        split: whether train and test were made here, of one part.
        groups: each training file's group, and each test file's where it has one; empty where no
            groups were asked for.
    """

    root: Path
    train: Classes
    test: Classes
    left_out: list[LeftOut] = field(default_factory=list)
    split: bool = False
    groups: dict[Path, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a user must know of it, a line each."""
        lines = []
        if self.split:
            count = sum(map(len, self.test.values()))
            lines.append(
                f"{self.root} has no train/ and test/: {count} images, {TEST_SHARE:.0%} of each "
                "class, are its test set"
            )
        if self.left_out:
            lines.append(f"{self.root}: {told(self.left_out)} (`dverge train --list-skipped`)")
        train, test = (
            {self.groups[file] for files in part.values() for file in files if file in self.groups}
            for part in (self.train, self.test)
        )
        if both := sorted(train & test):
            lines.append(
                f"warning: group '{both[0]}' ({len(both)} such) is in the training part and in the "
                "test part; figures on such test images are too good"
            )
        return lines


def read_folder(root: Path, group: str = "") -> ImageFolder:
    """Return the image files of a folder or of a CSV file.

    A folder has `train/<class>/` and `test/<class>/` (or `val/<class>/`); one with class folders
    alone is split by file names, so that the same image stays in the same part whatever is added.
    A CSV file has the columns `path` (from its own folder), `label` and, where it names the parts,
    `part` (train or test).

    Args:
        root: the folder or file.
        group: what names an image's group, see `training.data.groups`: a pattern on a file's path
            from the class folders on, or a column of the CSV file. A folder is split by groups.

    Raises:
        UserError: no such folder, fewer than two classes, a class without an image, classes that
            differ between the parts, or that differ in case or Unicode form alone, a file without
            a group.
    """
    found = (_csv if root.suffix.lower() == ".csv" else _folder)(root, group)
    _refuse_names_alike(found.train)
    if found.train.keys() != found.test.keys():
        odd = sorted(found.train.keys() ^ found.test.keys())
        where = "train" if odd[0] in found.train else "test"
        raise UserError(
            f"class '{odd[0]}' only under {root / where} ({len(odd)} classes differ)",
            "the same class folders under train and test",
        )
    return found


def _folder(root: Path, group: str) -> ImageFolder:
    layout = f"{root}/train/<class>/ and {root}/test/<class>/ with PNG, JPEG or WebP images"
    tests = [name for name in TEST_FOLDERS if (root / name).is_dir()]
    above = root.absolute().parent
    is_part = root.name in ("train", *TEST_FOLDERS) and (above / "train").is_dir()
    in_part = above.name in ("train", *TEST_FOLDERS) and (above.parent / "train").is_dir()
    left_out: list[LeftOut] = []
    if not root.is_dir():
        raise UserError(f"{root} is no folder" if root.exists() else f"no folder {root}", layout)
    whole = not is_part and not tests and not (root / "train").is_dir()
    if whole and len(_folders(root)) > 1:
        classes = _classes(root, layout, left_out)
        groups = _groups(classes, root, group)
        return ImageFolder(root, *_parts(classes, root, groups), left_out, True, groups)
    for part in ("train", tests[0] if tests else "test"):
        if not (root / part).is_dir():
            whole_set = above if is_part else above.parent if in_part else None
            next_step = f"give `data` {whole_set}" if whole_set else ""
            raise UserError(f"no folder {root / part}", layout, next_step)
    train, test = (_classes(root / name, layout, left_out) for name in ("train", tests[0]))
    left_out += [LeftOut(root / name, f"beside {tests[0]}/, the test set") for name in tests[1:]]
    return ImageFolder(root, train, test, left_out, groups=_groups(train, root / "train", group))


def _groups(classes: Classes, folder: Path, pattern: str) -> dict[Path, str]:
    files = (file for each in classes.values() for file in each)
    return groups_by_name(files, folder, pattern) if pattern else {}


def _folders(root: Path) -> list[Path]:
    """Return the class folders in a folder."""
    each = sorted(root.iterdir()) if root.is_dir() else []
    return [item for item in each if item.is_dir() and not is_hidden(item.name)]


def _classes(folder: Path, layout: str, left_out: list[LeftOut]) -> Classes:
    """Return each class's files, and add what is not used to `left_out`."""
    classes: Classes = {}
    chosen = _folders(folder)
    for other in sorted(set(folder.iterdir()) - set(chosen)):
        reason = HIDDEN if is_hidden(other.name) else "outside a class folder"
        left_out.append(LeftOut(other, reason))
    for each in chosen:
        if each.name != os.fsencode(each.name).decode(errors="replace"):
            raise UserError(f"class folder {folder}/{each.name!a} is not UTF-8", "a name in UTF-8")
        found = find_images(each)
        classes[each.name] = found.paths
        left_out += found.left_out
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class folders in {folder}", f"two or more: {layout}")
    if empty := [name for name, files in classes.items() if not files]:
        why = [each for each in left_out if each.path.is_relative_to(folder / empty[0])]
        raise UserError(
            f"no image in {folder / empty[0]} ({len(empty)} such classes)",
            "PNG, JPEG or WebP files in every class folder",
            told(why) if why else "",
        )
    return classes


def _parts(classes: Classes, root: Path, groups: dict[Path, str]) -> tuple[Classes, Classes]:
    """Return a training and a test part of each class, drawn by the hash of the files' names.

    Where there are groups, these are drawn, by the hash of theirs.
    """
    train: Classes = {}
    test: Classes = {}
    if groups:
        order = sorted(set(groups.values()), key=lambda name: sha256(name.encode()))
        every = [(name, file) for name, files in classes.items() for file in files]
        places = {name: place for place, name in enumerate(classes)}
        held = whole_groups(
            [places[name] for name, _ in every],
            [groups[file] for _, file in every],
            TEST_SHARE,
            order,
        )
        for (name, file), out in zip(every, held, strict=True):
            (test if out else train).setdefault(name, []).append(file)
        if lone := sorted(train.keys() - test.keys()):
            raise UserError(
                f"no group of class '{lone[0]}' in {root} for the test set ({len(lone)} such)",
                "two groups or more of every class, to split them",
            )
        return train, test
    for name, files in classes.items():
        if len(files) < 2:
            raise UserError(
                f"{len(files)} image of class '{name}' in {root}", "two or more, to split them"
            )
        drawn = sorted(files, key=lambda file: sha256(os.fsencode(file.relative_to(root))))
        count = max(1, round(TEST_SHARE * len(files)))
        test[name], train[name] = sorted(drawn[:count]), sorted(drawn[count:])
    return train, test


def _csv(path: Path, group: str) -> ImageFolder:
    columns = "columns path, label and, if it names the parts, part (train or test)"
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error})", f"a CSV file with {columns}") from error
    if not {"path", "label"} <= set(reader.fieldnames or ()):
        raise UserError(f"{path} has the columns {', '.join(reader.fieldnames or ())}", columns)
    if group and group not in (reader.fieldnames or ()):
        raise UserError(f"no column '{group}' in {path}", "a column that `data.group` names")
    parts: dict[str, Classes] = {}
    groups: dict[Path, str] = {}
    for number, row in enumerate(rows, 2):
        file, label, part = path.parent / (row["path"] or ""), row["label"], row.get("part", "")
        if not file.is_file():
            raise UserError(f"line {number} of {path}: no file {file}", "paths from its own folder")
        if not label or part not in ("", "train", "test"):
            raise UserError(f"line {number} of {path}: label '{label}', part '{part}'", columns)
        if group and not row[group]:
            raise UserError(f"line {number} of {path}: no {group}", "a group for every image")
        if group:
            groups[file] = row[group]
        parts.setdefault(part, {}).setdefault(label, []).append(file)
    sorted_parts = {
        part: {label: sorted(classes[label]) for label in sorted(classes)}
        for part, classes in parts.items()
    }
    if sorted_parts.keys() == {""} and len(sorted_parts[""]) > 1:
        both = _parts(sorted_parts[""], path.parent, groups)
        return ImageFolder(path, *both, split=True, groups=groups)
    if sorted_parts.keys() != {"train", "test"} or len(sorted_parts["train"]) < 2:
        named = ", ".join(f"'{part}'" for part in parts)
        raise UserError(
            f"{path} has the parts {named}", "two classes or more, and both or no parts"
        )
    return ImageFolder(path, sorted_parts["train"], sorted_parts["test"], groups=groups)


def _refuse_names_alike(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"classes '{other}' and '{name}' differ in case or in their Unicode form alone",
                "one of the two",
            )
