"""Groups of images: whole ones are held out, whoever names them."""

from __future__ import annotations

import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from tests.training.refusal import refusal
from training.config import Data
from training.data import sources
from training.data.class_counts import balance
from training.data.holdout import parts, whole_groups
from training.data.splits import Split, image_files, load_test, load_training
from training.recipe import data_overrides, load_recipe
from training.trainer import train

TRACK = r"(.+/\d+)_\d+"


def made(folder: Path, **classes: int) -> Path:
    """Return a folder with so many tracks of each class; a track has four frames alike."""
    level = 0
    for name, tracks in classes.items():
        (folder / name).mkdir(parents=True)
        for track in range(tracks):
            level += 1
            for frame in range(4):
                pixels = np.full((8, 8, 3), level, np.uint8)
                pixels[frame] += 100  # no two images are equal
                Image.fromarray(pixels).save(folder / name / f"{track:05}_{frame:05}.png")
    return folder


@pytest.fixture
def tracks(tmp_path: Path) -> Path:
    made(tmp_path / "train", stop=10, yield_=30)
    made(tmp_path / "test", stop=1, yield_=1)
    return tmp_path


def grouped(path: Path, group: str = TRACK, **more: float) -> Data:
    return Data(path=str(path), crop=(8, 8), group=group, **more)  # type: ignore[arg-type]


def levels(split: object) -> set[int]:
    """Return which tracks a split has, by their pixels' level."""
    assert isinstance(split, Split)
    return {int(level) % 100 for level in split.images[:, 0, 7, 0]}


def test_whole_tracks_are_held_out_of_every_class(tracks: Path) -> None:
    data = load_training(grouped(tracks))
    held = torch.bincount(data.holdout.labels).tolist()
    assert held == [4, 12]  # one of ten tracks, three of thirty
    assert data.groups == (36, 4)
    assert len(data.train) + len(data.holdout) == 160
    names = image_files(grouped(tracks), "train")
    parts = defaultdict(set)
    for at, name in enumerate(names):
        parts[name.rpartition("_")[0]].add(at < len(data.train))
    assert Counter(len(each) for each in parts.values()) == {1: 40}
    assert "held out: 4 of 40 groups, 16 images" in balance(data)


def test_the_same_groups_each_time_and_others_than_single_images(tracks: Path) -> None:
    one, other = load_training(grouped(tracks)), load_training(grouped(tracks))
    assert one.holdout.sha256 == other.holdout.sha256
    assert one.holdout.sha256 != load_training(grouped(tracks, "")).holdout.sha256
    assert load_training(grouped(tracks, "")).groups is None
    assert levels(one.train).isdisjoint(levels(one.holdout))


def test_numbers_that_begin_anew_in_each_class_may_be_one_group(tracks: Path) -> None:
    """The pattern decides: patients are the same in every class, tracks are not."""
    data = load_training(grouped(tracks, r"(\d+)_\d+", holdout=0.2))
    assert data.groups is not None
    assert sum(data.groups) == 30


def test_a_folder_without_parts_is_split_by_groups(tmp_path: Path) -> None:
    data = grouped(made(tmp_path / "signs", stop=10, yield_=30))
    _, test = load_test(data)
    training = load_training(data)
    assert torch.bincount(test.labels).tolist() == [8, 24]
    everything = [levels(each) for each in (training.train, training.holdout, test)]
    assert sum(map(len, everything)) == len(set.union(*everything)) == 40


def test_a_class_of_one_group_cannot_be_split(tmp_path: Path) -> None:
    message = refusal(grouped(made(tmp_path / "signs", stop=1, yield_=5)))
    assert "no group of class 'stop'" in message


def csv_of(tracks: Path, with_parts: bool) -> Path:
    rows = ["path,label,person" + ",part" * with_parts]
    for file in sorted(tracks.rglob("*.png")):
        part, label = file.parents[1].name, file.parent.name
        person = f"{label}-{file.name[:5]}"
        rows.append(f"{os.path.relpath(file, tracks)},{label},{person}" + f",{part}" * with_parts)
    (tracks / "all.csv").write_text("\n".join(rows))
    return tracks / "all.csv"


@pytest.mark.parametrize("with_parts", [True, False])
def test_a_column_of_a_csv_file_names_groups(with_parts: bool, tracks: Path) -> None:
    path = csv_of(tracks, with_parts)
    data = load_training(grouped(path, "person"))
    assert levels(data.train).isdisjoint(levels(data.holdout))
    assert data.groups is not None
    assert sum(data.groups) == (40 if with_parts else 33)
    assert set(image_files(grouped(path, "person"), "train")) <= {
        os.path.relpath(file, tracks) for file in tracks.rglob("*.png")
    }


def test_groups_in_both_parts_of_a_csv_file_are_warned_of(
    tracks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("training.data.splits.say", told.append)
    load_training(grouped(csv_of(tracks, True), "person"))
    assert any("group 'stop-00000' (2 such)" in line for line in told)


def test_what_cannot_name_groups_is_refused(tracks: Path) -> None:
    assert "stop/00000_00000.png" in refusal(grouped(tracks, r"(\d+)-\d+"))
    assert "no column 'patient'" in refusal(grouped(csv_of(tracks, True), "patient"))
    assert "can be held out (1 groups)" in refusal(grouped(tracks, r"(_)"))
    text = (tracks / "all.csv").read_text().replace(",stop-00003,", ",,", 1)
    (tracks / "all.csv").write_text(text)
    assert "no person" in refusal(grouped(tracks / "all.csv", "person"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": r"\d+_\d+"}, "one (capture group)"),
        ({"group": "("}, "one (capture group)"),
        ({"group": r"(\d)(\d)"}, "one (capture group)"),
        ({"group": r"(\d+)", "name": "digits", "mode": "L", "crop": (8, 8)}, "no file names"),
    ],
)
def test_a_pattern_has_one_capture_group(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        Data(**changes)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_run_records_it(tracks: Path, tmp_path: Path) -> None:
    changes = {"group": TRACK, "path": str(tracks), "name": "imagefolder", "mode": "RGB"}
    config = tiny_config(**{f"data__{key}": value for key, value in changes.items()})
    run = train(config, tmp_path / "run", device="cpu")
    assert run.checkpoint["holdout_groups"] == 4
    assert run.config.data.group == TRACK


@st.composite
def images(draw: st.DrawFn) -> Iterator[tuple[list[int], list[str]]]:
    count = draw(st.integers(1, 60))
    groups = draw(st.integers(1, 12))
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, groups)), min_size=count, max_size=count
        )
    )
    return [target for target, _ in pairs], [str(group) for _, group in pairs]  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(images(), st.floats(0.05, 0.5), st.randoms())
def test_no_group_is_parted_and_no_class_is_lost(
    each: tuple[list[int], list[str]], share: float, random: object
) -> None:
    targets, groups = each
    order = sorted(set(groups))
    random.shuffle(order)  # type: ignore[attr-defined]
    held = whole_groups(targets, groups, share, order)
    sides = {(group, out) for group, out in zip(groups, held.tolist(), strict=True)}
    assert len(sides) == len(set(groups))
    kept = {target for target, out in zip(targets, held, strict=True) if not out}
    assert kept == set(targets)


def test_the_tracks_of_traffic_signs(test_data: Path, tmp_path: Path) -> None:
    """By names alone: 888 tracks of ten frames, numbered anew in each of 43 classes."""
    with tarfile.open(test_data / "gtsrb.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    data = load_recipe("traffic-signs", data_overrides(tmp_path / "gtsrb")).data
    labels, files = sources.image_files(data, "train")
    kept, out = parts(files.targets, labels, data, files.groups)
    inside, outside = ({files.groups[row] for row in rows} for rows in (kept, out))
    assert len(inside) + len(outside) == len(inside | outside) == 888
    assert set(files.targets[out].tolist()) == set(range(43))
    assert 0.1 <= len(out) / len(files.paths) < 0.12
