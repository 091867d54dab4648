"""Folders of images: classes, pixels, and what is wrong with them."""

from __future__ import annotations

import io
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dverge_serve import images
from dverge_serve.image_folder import SUFFIXES, find_images
from tests.training.networks import rows, stored
from tests.training.refusal import refusal
from training.config import Data
from training.data.image_folder import read_folder
from training.data.splits import load_test, load_training


def picture(level: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level // 2, 0)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; four images each to train on and two to test on; one is of another size."""
    for part, count in (("train", 4), ("test", 2)):
        for place, name in enumerate(("ant", "bee")):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for number in range(count):
                (where / f"{number}.png").write_bytes(picture(100 * place + 10 * number))
    (tmp_path / "train" / "ant" / "deep").mkdir()
    (tmp_path / "train" / "ant" / "deep" / "tall.JPG").write_bytes(picture(9, (10, 40), "JPEG"))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "readme.md").write_text("not a class")
    return tmp_path


def from_folder(path: Path, **more: Any) -> Data:
    return Data(name="imagefolder", path=str(path), crop=(8, 8), holdout=0.12, **more)


def test_what_is_hidden_is_no_image(folder: Path) -> None:
    (folder / "train" / "ant" / "._0.png").write_bytes(b"a file manager's note")
    (folder / "train" / "ant" / ".cache").mkdir()
    (folder / "train" / "ant" / ".cache" / "0.png").write_bytes(picture(1))
    data = load_training(from_folder(folder))
    assert len(data.train) + len(data.holdout) == 9


def test_a_class_that_utf8_cannot_spell_is_refused_before_training(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / part / os.fsdecode(b"gr\xfcn"))
    assert "is not UTF-8" in refusal(from_folder(folder))


def test_a_folder_of_images_becomes_classes_and_pixels(folder: Path) -> None:
    data = load_training(from_folder(folder))
    assert data.labels == ("ant", "bee")
    assert len(data.train) + len(data.holdout) == 9
    every = torch.cat([stored(data.train).images, data.holdout.images])
    labels = torch.cat([data.train.labels, data.holdout.labels])
    assert Counter(labels.tolist()) == {0: 5, 1: 4}
    assert every.shape == (9, 3, 8, 8)
    plain = every[labels == 1]
    assert sorted(plain[:, 0, 3, 3].tolist()) == [100, 110, 120, 130]
    assert sorted(plain[:, 1, 3, 3].tolist()) == [50, 55, 60, 65]
    names, test = load_test(from_folder(folder))
    assert names == ("ant", "bee")
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [0, 10, 100, 110]
    assert len(load_test(from_folder(folder, test_limit=3))[1]) == 3


def test_training_sees_what_the_service_will_see(folder: Path) -> None:
    data = from_folder(folder, resize=(12, 12))
    training = load_training(data)
    found = set(rows(training.train) + rows(training.holdout))
    for file in (folder / "train").rglob("*"):
        if file.suffix.lower() in SUFFIXES:
            assert images.load(file.read_bytes(), data.preprocess).tobytes() in found


def test_no_folder_given() -> None:
    assert "`data` FOLDER" in refusal(Data(name="imagefolder"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = refusal(from_folder(tmp_path / "nowhere"))
    assert f"no folder {tmp_path / 'nowhere'};" in message
    assert "train/<class>/" in message


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    assert "no folder" in refusal(from_folder(tmp_path))


def test_a_missing_test_folder_is_found_before_training(folder: Path) -> None:
    (folder / "test").rename(folder / "held out")
    assert f"no folder {folder / 'test'}" in refusal(from_folder(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    assert f"0 class folders in {tmp_path / 'train'}" in refusal(from_folder(tmp_path))


def test_a_single_class(folder: Path) -> None:
    for part in ("train", "test"):
        for file in (folder / part / "bee").iterdir():
            file.unlink()
        (folder / part / "bee").rmdir()
    assert "1 class folders" in refusal(from_folder(folder))


def test_a_class_with_no_image_is_named(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "notes.txt").write_text("none")
    message = refusal(from_folder(folder))
    assert f"no image in {folder / 'train' / 'cat'} (2 such classes)" in message


def test_classes_that_differ_between_train_and_test_are_named(folder: Path) -> None:
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    message = refusal(from_folder(folder))
    assert f"class 'bee' only under {folder / 'train'} (2 classes differ)" in message


def test_unreadable_images_are_named_and_counted(folder: Path) -> None:
    for number in range(4):
        (folder / "train" / "bee" / f"{number}.png").write_bytes(b"no image")
    whole = picture(3, (30, 30))
    (folder / "train" / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(from_folder(folder))
    assert "5 of 9 images" in message
    assert str(folder / "train" / "ant" / "0.png") in message
    assert str(folder / "train" / "bee" / "0.png") in message
    assert "bee/3.png" not in message  # three are enough to begin with
    assert "truncated" in message


def test_every_class_keeps_a_training_image(folder: Path) -> None:
    message = refusal(from_folder(folder, train_limit=3))
    assert "no training image left of class" in message or "3 training images" in message


def test_classes_are_sorted_by_name(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "Aardvark").mkdir()
        (folder / part / "Aardvark" / "a.webp").write_bytes(picture(1, kind="WEBP"))
    assert list(read_folder(folder).train) == ["Aardvark", "ant", "bee"]


def test_a_limit_decodes_no_more_images_than_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, name, at in itertools.product(("train", "test"), ("a", "b"), range(20)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), at).save(folder / f"{at}.png")
    decoded: list[int] = []
    load = images.load

    def counted(*given: Any, **named: Any) -> Any:
        decoded.append(1)
        return load(*given, **named)

    monkeypatch.setattr(images, "load", counted)
    data = Data(path=str(tmp_path), mode="L", crop=(8, 8), train_limit=12, test_limit=5)
    training = load_training(data)
    assert len(training.train) + len(training.holdout) == len(decoded) == 12
    assert len(load_test(data)[1]) == 5
    assert len(decoded) == 17


def test_each_file_that_is_not_used_is_counted_by_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dverge_serve.image_folder.find_spec", lambda name: None)
    ant = folder / "train" / "ant"
    (ant / "phone.heic").write_bytes(b"x")
    (ant / "old.jfif").write_bytes(picture(5, kind="JPEG"))
    (ant / "older.JPE").write_bytes(picture(6, kind="JPEG"))
    (ant / "bare").write_bytes(picture(7))
    (ant / "bare-webp").write_bytes(picture(8, kind="WEBP"))
    (ant / "sound").write_bytes(b"RIFF\0\0\0\0WAVE")
    (ant / "gone.png").symlink_to(folder / "nowhere.png")
    (ant / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "__MACOSX").mkdir()
    found = read_folder(folder)
    assert {path.name for path in found.train["ant"]} == {
        *("0.png", "1.png", "2.png", "3.png", "tall.JPG"),
        *("old.jfif", "older.JPE", "bare", "bare-webp"),
    }
    reasons = {each.path.name: each.reason for each in found.left_out}
    assert reasons == {
        "phone.heic": ".heic (install dverge-serve[heif], or save them as JPEG or PNG)",
        "notes.txt": ".txt (not PNG, JPEG or WebP)",
        "sound": "without a suffix (not PNG, JPEG or WebP)",
        "gone.png": "that links to nothing",
        ".ipynb_checkpoints": "hidden, or of the system",
        ".thumbnails": "hidden, or of the system",
        "__MACOSX": "hidden, or of the system",
        "readme.md": "outside a class folder",
    }
    (note,) = found.notes
    assert "3 hidden, or of the system" in note
    assert "1 .heic (install dverge-serve[heif]," in note


def test_heic_photos_are_images_where_their_reader_is_installed(folder: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    ant = folder / "train" / "ant"
    heif.from_pillow(Image.new("RGB", (64, 64), (40, 50, 60))).save(ant / "phone.HEIC")
    data = load_training(from_folder(folder))
    assert len(data.train) + len(data.holdout) == 10
    (ant / "broken.heif").write_bytes((ant / "phone.HEIC").read_bytes()[:-20])
    message = refusal(from_folder(folder))
    assert "1 of 11 images" in message
    assert "broken.heif (the image is truncated" in message


def test_links_to_folders_are_followed_once_and_not_in_circles(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    (real / "deep").mkdir(parents=True)
    (real / "deep" / "0.png").write_bytes(picture(1))
    (real / "deep" / "circle").symlink_to(real)
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "link").symlink_to(real)
    (folder / "second").symlink_to(real / "deep")
    found = find_images(folder)
    assert found.paths == [folder / "link" / "deep" / "0.png"]
    assert {each.reason for each in found.left_out} == {"a link to a folder that is used already"}
    assert len(found.left_out) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    (left,) = find_images(tmp_path).left_out
    assert left.path == locked


def test_class_folders_alone_are_split_and_stay_split(folder: Path) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            for file in list((folder / part / name).glob("*.png")):
                (folder / name).mkdir(exist_ok=True)
                file.rename(folder / name / f"{part}-{file.name}")
    for part in ("train", "test"):
        shutil.rmtree(folder / part)
    found = read_folder(folder)
    assert found.split
    assert "no train/ and test/: 2 images, 20% of each class" in found.notes[0]
    both = [*found.train["ant"], *found.test["ant"]]
    assert sorted(both) == sorted((folder / "ant").iterdir())
    assert len(found.test["ant"]) == len(found.test["bee"]) == 1
    for number in range(6):
        (folder / "ant" / f"more-{number}.png").write_bytes(picture(number))
    later = read_folder(folder)
    moved = set(found.test["ant"]) & set(later.train["ant"])
    assert len(later.test["ant"]) == 2
    assert len(moved) <= 1


def test_val_is_the_test_set_where_there_is_no_other(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load_test(from_folder(folder))[1]) == 4
    (folder / "val").rename(folder / "test")
    (folder / "val" / "ant").mkdir(parents=True)
    (left,) = [each for each in read_folder(folder).left_out if each.path.name == "val"]
    assert left.reason == "beside test/, the test set"


def test_the_parent_of_train_is_named(folder: Path) -> None:
    assert f"give `data` {folder}" in refusal(from_folder(folder / "train"))


@pytest.mark.parametrize("names", [("Ant", "ant"), ("caf\u00e9", "cafe\u0301")])
def test_classes_that_look_alike_are_refused(names: tuple[str, str], folder: Path) -> None:
    for part in ("train", "test"):
        for at, name in enumerate(names):
            (folder / part / name).mkdir(exist_ok=True)
            (folder / part / name / "0.png").write_bytes(picture(at))
    assert "differ in case or in their Unicode form alone" in refusal(from_folder(folder))


@pytest.mark.parametrize("parts", [True, False])
def test_a_csv_file_names_images_and_labels(parts: bool, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    rows = [f"{f.relative_to(folder)},{f.parent.name},{f.parents[1].name}" for f in files]
    if not parts:
        rows = [row.rpartition(",")[0] for row in rows]
    header = "path,label,part" if parts else "path,label"
    (folder / "labels.csv").write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    data = from_folder(folder / "labels.csv")
    names, test = load_test(data)
    assert names == ("ant", "bee")
    assert len(test) == (4 if parts else 2)
    trained = load_training(data)
    assert len(trained.train) + len(trained.holdout) == (8 if parts else 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na,b\n", "has the columns file, label"),
        ("path,label\nnone.png,ant\n", "line 2 of"),
        ("path,label,part\ntrain/ant/0.png,ant,third\n", "part 'third'"),
        ("path,label,part\ntrain/ant/0.png,ant,train\n", "has the parts 'train'"),
        ("path,label\ntrain/ant/0.png,\n", "label ''"),
        ("path,label\ntrain/ant/0.png,ant\ntrain/bee/0.png,bee\n", "1 image of class 'ant'"),
    ],
)
def test_a_csv_file_that_says_too_little_is_refused(text: str, words: str, folder: Path) -> None:
    (folder / "labels.csv").write_text(text)
    assert words in refusal(from_folder(folder / "labels.csv"))


def test_many_classes_of_two_images_are_held_out_by_class(tmp_path: Path) -> None:
    for part, at, number in itertools.product(("train", "test"), range(50), range(2)):
        where = tmp_path / part / f"{at:02}"
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{number}.png").write_bytes(picture(at))
    data = load_training(from_folder(tmp_path))
    assert set(data.train.labels.tolist()) == set(range(50))
    assert len(data.holdout) == 12
    assert len(set(data.holdout.labels.tolist())) == 12
