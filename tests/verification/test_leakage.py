"""Leakage: copies of training images among the test images are found, other pictures are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import Data
from training.data.sources import image_files as sources_files
from training.data.splits import Split, image_files, load_test, load_training
from training.data.streaming import streamed
from training.recipe import load_recipe
from verification.leakage import NAMED, Leakage, Pair, find_leakage, known_leakage, no_leakage


def pictures(count: int, seed: int, side: int = 32) -> torch.Tensor:
    """Return smooth random colour pictures, uint8."""
    draw = torch.Generator().manual_seed(seed)
    rough = torch.rand((count, 3, 6, 6), generator=draw)
    smooth = torch.nn.functional.interpolate(rough, side, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def split(images: torch.Tensor, label: int = 0) -> Split:
    return Split(images, torch.full((len(images),), label))


def saved(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Return the images as they come out of a JPEG file."""
    out = []
    for image in images.numpy():
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(out))


def test_exact_copies_are_found_in_both_parts_of_the_training_images() -> None:
    train, held, test = pictures(50, 0), pictures(9, 1), pictures(30, 2)
    test[4], test[7] = train[40], held[3]
    found = find_leakage([split(train), split(held)], split(test))
    assert found.pairs == (Pair(4, 40, "exact", 0, 0), Pair(7, 53, "exact", 0, 0))
    assert (found.test_images, found.training_images) == (30, 59)
    assert (found.two_classes, found.contradicted) == (0, frozenset())
    assert no_leakage(found, known=True).passed is False


@pytest.mark.parametrize("side", [32, 48])
def test_the_same_picture_in_another_form_is_nearly_the_same(side: int) -> None:
    train = pictures(40, 0, side)
    noise = torch.randint(-6, 7, train.shape, generator=torch.Generator().manual_seed(1))
    forms = [
        saved(train, 75),
        (train.float() * 0.7 + 40).round().to(torch.uint8),
        (train.int() + noise).clamp(0, 255).to(torch.uint8),
        torch.nn.functional.interpolate(
            torch.nn.functional.interpolate(train.float(), side // 2, mode="area"), side
        ).to(torch.uint8),
    ]
    for form in forms:
        found = find_leakage([split(train)], split(form))
        assert [(pair.test, pair.train) for pair in found.pairs] == [(n, n) for n in range(40)]
        assert found.count("near") == 40
    assert find_leakage([split(train)], split(pictures(40, 5, side))).pairs == ()


def test_thumbnails_that_agree_are_not_enough() -> None:
    train = pictures(5, 0)
    other = train.flip(1)  # red and blue exchanged: the same greys
    assert find_leakage([split(train)], split(other)).pairs == ()


def test_images_of_one_colour_are_compared_by_their_pixels_alone() -> None:
    grey = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    found = find_leakage([split(grey)], split(torch.cat([grey, grey + 1])))
    assert [pair.kind for pair in found.pairs] == ["exact"]


def test_one_image_in_two_classes_is_counted() -> None:
    train, test = pictures(6, 0), pictures(200, 1)
    train[5] = train[0]
    test[3], test[199] = train[1], test[2]
    labels = torch.zeros(200, dtype=torch.int64)
    labels[3], labels[199] = 1, 1
    parts = Split(train, torch.tensor([0, 0, 0, 0, 0, 1]))
    found = find_leakage([parts], Split(test, labels))
    assert found.two_classes == 3
    assert found.contradicted == {2, 3, 199}
    gate = no_leakage(found, known=False)
    assert gate.passed is False  # 3 of 200
    assert "of the data given" in gate.detail


def test_images_compared_before_are_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = pictures(40, 10), pictures(20, 11)
    test[2], test[3] = train[4], saved(train[5:6], 90)[0]
    parts, others = [split(train)], Split(test, torch.arange(20))
    first = known_leakage(parts, others)
    assert first == find_leakage(parts, others)
    assert [pair.kind for pair in first.pairs] == ["exact", "near"]
    monkeypatch.setattr("verification.leakage.find_leakage", None)
    assert known_leakage(parts, others) == first


def test_one_in_a_hundred_is_allowed() -> None:
    pair = Pair(0, 0, "near", 0, 0)
    for images, passes in ((100, True), (99, False)):
        assert no_leakage(Leakage(images, 5, (pair,), 0, frozenset()), True).passed is passes


def test_the_digits_have_none() -> None:
    data = load_recipe("digits").data
    training = load_training(data)
    found = find_leakage([training.train, training.holdout], load_test(data)[1])
    assert (found.pairs, found.two_classes) == ((), 0)
    assert found.training_images == 1797 - 360


def test_files_are_named_also_where_images_stay_on_disk(tmp_path: Path) -> None:
    images = {part: pictures(24, seed, 16) for seed, part in enumerate(("train", "test"))}
    images["test"][5] = images["train"][20]
    for part, pixels in images.items():
        for at, image in enumerate(pixels.numpy()):
            path = tmp_path / part / "ab"[at % 2] / f"{at:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
    data = Data(name="imagefolder", path=str(tmp_path), crop=(16, 16), workers=0)
    training, (_, test) = load_training(data), load_test(data)
    found = find_leakage([training.train, training.holdout], test)
    table = found.to_json(image_files(data, "test"), image_files(data, "train"))
    (pair,) = table["pairs"]
    assert (pair["test"], pair["train"]) == ("test/b/05.png", "train/a/20.png")
    assert pair["kind"] == "exact"
    assert found.contradicted
    whole = streamed(sources_files(data, "train")[1], data)
    assert find_leakage([whole], test).count("exact") == 1
    assert image_files(load_recipe("digits").data, "test") == []
    named = found.to_json([], [])["pairs"][0]
    assert named["test"] == f"test image {found.pairs[0].test}"
    many = Leakage(500, 500, tuple(Pair(n, n, "near", 0, 0) for n in range(500)), 0, frozenset())
    assert len(many.to_json([], [])["pairs"]) == NAMED
