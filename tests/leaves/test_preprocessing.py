"""From a picture to the model's pixels: scaled to cover, the centre taken, then floats."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dverge_serve import images
from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess, load, to_float
from tests.leaves.pictures import SIZE, Pixels, encode, exactly, noise, waves


def cover(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """Do in two steps what the product does in one: resize the whole image, cut out the centre."""
    height, width = preprocess.resize
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    size = (
        max(width, round(pixels.shape[1] * scale)),
        max(height, round(pixels.shape[0] * scale)),
    )
    whole = Image.fromarray(pixels).resize(size, images.INTERPOLATIONS[preprocess.interpolation])
    crop_height, crop_width = preprocess.crop
    left, top = (size[0] - crop_width) // 2, (size[1] - crop_height) // 2
    return np.asarray(whole)[top : top + crop_height, left : left + crop_width]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.tuples(st.integers(8, 24), st.integers(8, 24)),
    extra=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_an_image_is_scaled_to_cover_and_its_centre_is_taken(
    size: tuple[int, int],
    crop: tuple[int, int],
    extra: tuple[int, int],
    interpolation: Literal["bilinear", "bicubic"],
) -> None:
    resize = (crop[0] + extra[0], crop[1] + extra[1])
    preprocess = Preprocess(mode="RGB", resize=resize, crop=crop, interpolation=interpolation)
    # Bicubic overshoots between the two passes are clipped, so there the passes' order shows on
    # noise; a smooth image has none.
    pixels = noise(*size, 3) if interpolation == "bilinear" else waves(*size)
    found = load(encode(pixels), preprocess).transpose(1, 2, 0)
    assert found.shape == (*crop, 3)
    expected = pixels if size == crop else cover(pixels, preprocess)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_nearest_keeps_the_colours_there_are() -> None:
    pixels = noise(16, 16, 3)
    preprocess = Preprocess(mode="RGB", resize=(8, 8), crop=(8, 8), interpolation="nearest")
    found = load(encode(pixels), preprocess).transpose(1, 2, 0)
    assert np.array_equal(found, pixels[1::2, 1::2])


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (3000, 2), (2, 3000)])
def test_extreme_shapes_take_neither_long_nor_much_memory(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled naively, the longest would become an image of 4,096,000 x 256 pixels."""
    pixels = np.zeros((*size, 3), np.uint8)
    long = size.index(max(size))
    middle = slice(max(size) * 45 // 100, max(size) * 55 // 100)
    pixels[(slice(None),) * long + (middle,)] = 200
    preprocess = Preprocess(mode="RGB", resize=(256, 256), crop=(224, 224))
    asked: list[tuple[int, int]] = []
    real = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *more: Any, **named: Any) -> Image.Image:
        asked.append(size)
        return real(self, size, *more, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    found = load(encode(pixels), preprocess)
    assert asked == [(224, 224)]
    assert found.shape == (3, 224, 224)
    assert (found.min(), found.max()) == (200, 200)


def test_the_centre_is_the_centre() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    found = load(encode(pixels), Preprocess(mode="L", resize=(20, 20), crop=(20, 20)))
    assert found.min() == 255
    tall = load(
        encode(pixels.transpose(1, 0, 2)), Preprocess(mode="L", resize=(20, 20), crop=(8, 8))
    )
    assert tall.min() == 255


def test_floats_are_the_levels_over_255() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    found = to_float(levels)
    assert found.dtype == np.float32
    assert np.array_equal(found, (levels / np.float32(255)).astype(np.float32))
    assert (found.min(), found.max()) == (0.0, 1.0)
    assert np.array_equal(np.rint(found * 255).astype(np.uint8), levels)


def test_preprocessing_survives_being_written_down() -> None:
    one = Preprocess(mode="L", resize=(40, 50), crop=(32, 24), interpolation="bicubic")
    assert one.shape == (1, 32, 24)
    assert exactly("RGB").shape == (3, *SIZE)
    assert Preprocess.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "CMYK"},
        {"interpolation": "lanczos"},
        {"crop": (9, 8)},
        {"crop": (8, 9)},
        {"crop": (0, 8)},
        {"crop": (-1, 8)},
    ],
)
def test_preprocessing_that_cannot_be_is_one_line(wrong: dict[str, Any]) -> None:
    values: dict[str, Any] = {"mode": "RGB", "resize": (8, 8), "crop": (8, 8)}
    with pytest.raises(UserError, match="expected") as caught:
        Preprocess(**values | wrong)
    assert caught.value.exit_code == 2
