"""The decoder and the preprocessing: what is taken, what is refused, and what comes out."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dverge_serve import images
from dverge_serve.errors import UserError
from dverge_serve.images import ImageError, Preprocess, load, to_float

Pixels = npt.NDArray[np.uint8]
SIZE = (6, 9)  # height, width
LOSSLESS: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True})]


def exactly(mode: Literal["L", "RGB"], size: tuple[int, int] = SIZE) -> Preprocess:
    """Return the preprocessing that leaves an image of this size alone."""
    return Preprocess(mode=mode, resize=size, crop=size)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Return a gradient, which JPEG keeps to within a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * rows / (height - 1), 255 * columns / (width - 1)
    levels: Pixels = np.stack([red, green, (red + green) / 2], axis=2).astype(np.uint8)
    return levels


def waves(height: int, width: int) -> Pixels:
    """Return slow waves that stay clear of black and white."""
    rows, columns = np.mgrid[0:height, 0:width]
    phases = np.stack([rows / 5, columns / 7, (rows + columns) / 9], axis=2)
    levels: Pixels = (128 + 80 * np.sin(phases)).astype(np.uint8)
    return levels


def encode(image: Image.Image | Pixels, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **options)
    return file.getvalue()


def refusal(data: bytes, code: str, **more: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load(data, exactly("RGB"), **more)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_colour_at_the_right_size_comes_out_bit_for_bit(kind: str, options: Any) -> None:
    pixels = noise(*SIZE, 3)
    found = load(encode(pixels, kind, **options), exactly("RGB"))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert np.array_equal(found, pixels.transpose(2, 0, 1))


def test_the_right_size_is_left_alone_even_where_resize_is_larger() -> None:
    pixels = noise(*SIZE, 3)
    preprocess = Preprocess(mode="RGB", resize=(12, 18), crop=SIZE)
    assert np.array_equal(load(encode(pixels), preprocess), pixels.transpose(2, 0, 1))


def test_gray_comes_out_bit_for_bit_in_one_channel_or_three() -> None:
    pixels = noise(*SIZE)
    assert np.array_equal(load(encode(pixels), exactly("L")), pixels[None])
    assert np.array_equal(load(encode(pixels), exactly("RGB")), np.stack([pixels] * 3))


def test_colour_becomes_gray_by_luma() -> None:
    pixels = noise(*SIZE, 3)
    found = load(encode(pixels), exactly("L"))[0].astype(float)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found - luma).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded_to_within_its_loss(mode: Literal["RGB", "L"]) -> None:
    pixels = smooth(32, 48)
    picture = Image.fromarray(pixels).convert(mode)
    found = load(encode(picture, "JPEG", quality=98, subsampling=0), exactly("RGB", (32, 48)))
    expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1).astype(int)
    assert np.abs(found.astype(int) - expected).max() <= 6


def test_lossy_webp_is_decoded_to_within_its_loss() -> None:
    pixels = smooth(32, 48)
    found = load(encode(pixels, "WEBP", quality=95), exactly("RGB", (32, 48)))
    assert np.abs(found.astype(int) - pixels.transpose(2, 0, 1)).mean() <= 6


def on_white(colour: Pixels, alpha: Pixels) -> npt.NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize(
    ("kind", "options"), [*LOSSLESS[:1], ("WEBP", {"lossless": True, "exact": True})]
)
def test_alpha_is_composited_on_white(kind: str, options: Any) -> None:
    pixels = noise(*SIZE, 4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    found = load(encode(pixels, kind, **options), exactly("RGB")).transpose(1, 2, 0)
    assert np.abs(found - on_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == pixels[0, 1, :3].tolist()


def test_gray_with_alpha_is_composited_on_white() -> None:
    gray, alpha = noise(*SIZE), noise(*SIZE, seed=1)
    picture = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    found = load(encode(picture), exactly("L"))[0]
    assert np.abs(found - on_white(gray[..., None], alpha)[..., 0]).max() <= 1


def test_a_palette_is_looked_up() -> None:
    indices = noise(*SIZE) % 4
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    found = load(encode(picture), exactly("RGB")).transpose(1, 2, 0)
    assert np.array_equal(found, palette[indices])


@pytest.mark.parametrize("transparency", [2, bytes([255, 128, 0, 255])])
def test_a_palette_with_transparency_is_composited_on_white(transparency: int | bytes) -> None:
    indices = noise(*SIZE) % 4
    palette = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 8, 7]], dtype=np.uint8)
    alphas = [255, 255, 0, 255] if isinstance(transparency, int) else list(transparency)
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    found = load(encode(picture, transparency=transparency), exactly("RGB")).transpose(1, 2, 0)
    expected = on_white(palette[indices], np.array(alphas, dtype=np.uint8)[indices])
    assert np.abs(found - expected).max() <= 1


def test_a_transparent_colour_turns_white() -> None:
    pixels = noise(*SIZE, 3)
    pixels[2, 3] = (1, 2, 3)
    found = load(encode(pixels, transparency=(1, 2, 3)), exactly("RGB")).transpose(1, 2, 0)
    assert found[2, 3].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == pixels[0, 0].tolist()
    gray = noise(*SIZE)
    gray[1, 1] = 77
    assert load(encode(gray, transparency=77), exactly("L"))[0, 1, 1] == 255


def test_one_bit_images_are_black_and_white() -> None:
    bits = noise(*SIZE) > 127
    found = load(encode(Image.fromarray(bits)), exactly("L"))[0]
    assert np.array_equal(found, np.where(bits, 255, 0))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bit_gray_is_scaled_not_cut(mode: Literal["L", "RGB"]) -> None:
    wide = np.random.default_rng(0).integers(0, 65536, SIZE, dtype=np.uint16)
    wide[0, :4] = (0, 65535, 257, 128)
    data = encode(Image.fromarray(wide))
    assert data[24] == 16  # the PNG's bit depth
    found = load(data, exactly(mode))
    for channel in found:
        assert np.array_equal(channel, np.rint(wide / 257).astype(np.uint8))
    assert found[0, 0, :4].tolist() == [0, 255, 1, 0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_cmyk_jpeg_becomes_rgb(mode: Literal["L", "RGB"]) -> None:
    picture = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    data = encode(picture, "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    found = load(data, exactly(mode, (16, 16)))
    expected = [0, 255, 255] if mode == "RGB" else [0.587 * 255 + 0.114 * 255]
    assert found[:, 8, 8].tolist() == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """What a viewer shows upright: four quarters of different brightness."""
    upright = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((16, 16), np.uint8))
    # By the standard: which row and column of the stored image are the upright one's top and left.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    found = load(encode(picture, kind, exif=exif.tobytes()), exactly("L", (32, 32)))[0]
    quarters = found[8::16, 8::16].astype(int)
    assert np.abs(quarters - [[0, 80], [160, 240]]).max() <= 6


def test_rotation_comes_before_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(9, 6, 3)  # stored lying; upright it is 6 high and 9 wide
    found = load(encode(pixels, exif=exif.tobytes()), exactly("RGB", (6, 9)))
    assert np.array_equal(found.transpose(1, 2, 0), np.rot90(pixels, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_does_not_cost_the_image(kind: str, exif: bytes) -> None:
    """In a process with the module's own warning filters, as it is served."""
    plain = load(encode(noise(*SIZE, 3), kind), exactly("RGB"))
    data = encode(noise(*SIZE, 3), kind, exif=exif)
    script = (
        "import sys; from dverge_serve.images import *;"
        f"p = Preprocess(mode='RGB', resize={SIZE}, crop={SIZE});"
        "sys.stdout.buffer.write(load(sys.stdin.buffer.read(), p).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
    assert done.stdout == plain.tobytes(), done.stderr
    assert not done.stderr


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated_images_are_refused(kind: str) -> None:
    frames = [Image.fromarray(noise(*SIZE, 3, seed=seed)) for seed in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert "single frame" in refusal(data, "animated_image")


def test_a_photo_with_a_preview_behind_it_is_taken() -> None:
    frames = [Image.fromarray(smooth(32, 48)), Image.fromarray(noise(16, 16, 3))]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=98)
    found = load(data, exactly("RGB", (32, 48)))
    assert np.abs(found.astype(int) - smooth(32, 48).transpose(2, 0, 1)).mean() <= 4


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    data = encode(Image.fromarray(noise(16, 16, 3)), kind)
    assert "PNG, JPEG or WebP" in refusal(data, "not_an_image")


def test_content_decides_not_the_name() -> None:
    assert "empty" in refusal(b"", "empty_image")
    for data in (b"\0", b"hello", b"<svg/>", b"PK\x03\x04" + bytes(100)):
        refusal(data, "not_an_image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_wherever_it_ends(kind: str) -> None:
    data = encode(noise(40, 40, 3), kind)
    end = len(data) - (30 if kind == "PNG" else 0)  # past its pixels a PNG holds nothing we need
    for length in range(1, end, max(1, len(data) // 60)):
        with pytest.raises(ImageError) as caught:
            load(data[:length], exactly("RGB"))
        assert caught.value.code in ("broken_image", "not_an_image")
    refusal(data[: len(data) // 2], "broken_image")


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x20\0\0\0WEBPVP8 ", b"GIF89a"]
    ),
    rest=st.binary(max_size=200),
)
def test_random_bytes_raise_nothing_but_an_image_error(head: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        load(head + rest, exactly("RGB"))


WHOLE = {kind: encode(noise(12, 12, 3), kind) for kind in ("PNG", "JPEG", "WEBP")}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=5),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_give_pixels_or_an_image_error(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(WHOLE[kind])
    for where, value in changes:
        data[int(where * len(data))] = value
    try:
        found = load(bytes(data), exactly("RGB", (12, 12)), max_pixels=10_000)
    except ImageError:
        return
    assert found.shape == (3, 12, 12)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG that claims to be huge and would unpack to a gigabyte."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1_000_000), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_more_than_max_pixels_is_refused_before_a_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    message = refusal(bomb(30_000, 30_000), "image_too_large")
    assert "30000x30000 pixels; expected at most 16777216" in message
    for kind in ("PNG", "JPEG"):
        refusal(encode(noise(11, 11, 3), kind), "image_too_large", max_pixels=120)


def test_exactly_max_pixels_is_taken() -> None:
    load(encode(noise(11, 11, 3)), exactly("RGB"), max_pixels=121)
    refusal(encode(noise(11, 11, 3), "WEBP"), "image_too_large", max_pixels=120)


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
