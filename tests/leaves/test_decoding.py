"""What comes out of the decoder: colour, gray, alpha, palettes, depth and rotation."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dverge_serve.images import ImageError, Preprocess, load, to_pixels
from tests.leaves.pictures import SIZE, Pixels, encode, exactly, noise, smooth

LOSSLESS: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True})]


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


def png(bits: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """Return a PNG of equal rows with a value named as transparent; Pillow writes 8 bits alone."""
    height, width = SIZE
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + row) * height)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_turns_white_at_every_depth(bits: int) -> None:
    values = [1, 0] * (SIZE[1] // 2) + [1]
    row = "".join(f"{value:0{bits}b}" for value in values)
    row = row.ljust(-(-len(row) // 8) * 8, "0")
    packed = int(row, 2).to_bytes(len(row) // 8, "big")
    for mode in ("L", "RGB"):
        found = load(png(bits, 0, packed, struct.pack(">H", 1)), exactly(mode))
        assert found[0, 0].tolist() == [255 if value else 0 for value in values]


def test_a_transparent_colour_turns_white_at_sixteen_bits() -> None:
    colours = [(1000, 2000, 3000), (1000, 2000, 60_000)] * (SIZE[1] // 2) + [(0, 0, 0)]
    row = b"".join(struct.pack(">HHH", *colour) for colour in colours)
    found = load(png(16, 2, row, struct.pack(">HHH", *colours[0])), exactly("RGB"))
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    assert found[:, 0, 1].tolist() == [3, 7, 234]
    assert found[:, 0, -1].tolist() == [0, 0, 0]


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


def test_a_large_photograph_is_decoded_at_a_part_of_its_size(tmp_path: Path) -> None:
    """5000 by 4000 pixels: a quarter of a byte for each in place of three."""
    ramp = np.linspace(0, 255, 5000, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (4000, 5000, 3)))
    preprocess = Preprocess(mode="RGB", resize=(96, 96), crop=(96, 96))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    sizes: list[tuple[int, int]] = []
    whole = Image.Image.resize

    def resize(self: Image.Image, *given: Any, **named: Any) -> Image.Image:
        sizes.append(self.size)
        return whole(self, *given, **named)

    with mock.patch.object(Image.Image, "resize", resize):
        small, large = (to_pixels(tmp_path / name, preprocess) for name in ("a.jpg", "a.png"))
    assert sizes == [(2500, 2000), (5000, 4000)]
    assert int(np.abs(small.astype(int) - large).max()) <= 2
    with pytest.raises(ImageError, match="5000x4000 pixels"):
        load((tmp_path / "a.jpg").read_bytes(), preprocess)


def test_a_file_beyond_every_camera_is_refused(tmp_path: Path) -> None:
    Image.new("L", (12_000, 12_000)).save(tmp_path / "a.png")
    preprocess = Preprocess(mode="L", resize=(8, 8), crop=(8, 8))
    with pytest.raises(ImageError, match="12000x12000 pixels"):
        to_pixels(tmp_path / "a.png", preprocess)


def test_heic_files_of_ones_own_are_decoded_upright_and_the_services_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif")
    pixels, exif = smooth(32, 48), Image.Exif()
    exif[0x0112] = 6  # lying on its side: the decoder turns it, and the tag must not turn it again
    file = tmp_path / "photo.HEIC"
    heif.from_pillow(Image.fromarray(pixels)).save(file, quality=95, exif=exif.tobytes())
    found = to_pixels(file, exactly("RGB", (48, 32))).astype(int)
    assert np.abs(found - np.rot90(pixels, -1).transpose(2, 0, 1)).mean() < 3
    with pytest.raises(ImageError, match="not an image"):
        load(file.read_bytes(), exactly("RGB", (32, 48)))
    monkeypatch.setattr("dverge_serve.images.MAX_FILE_PIXELS", 32 * 48 - 1)
    with pytest.raises(ImageError, match="32x48 pixels"):
        to_pixels(file, exactly("RGB", (32, 48)))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="install dverge-serve"):
        to_pixels(file, exactly("RGB", (32, 48)))
