"""Every kind of picture, sound or not, through `/predict`; the colour model names what it saw."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from dverge_serve.serving.responses import CODES
from tests.serving.server import Server, serving
from tests.serving.tiny import SIDE, encode, flat, save_colour_model

Picture = Callable[[], bytes]
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("colour")
    save_colour_model(folder / "model.onnx")
    with serving(folder) as server:
        yield server


def corner(colour: tuple[int, int, int], x: int, y: int) -> Image.Image:
    """Return a white picture with a 4x4 corner of one colour; x and y are 0 or 1."""
    image = Image.new("RGB", (SIDE, SIDE), WHITE)
    image.paste(Image.new("RGB", (4, 4), colour), (4 * x, 4 * y))
    return image


def rotated(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the bottom right corner belongs at the top left
    return encode(corner(RED, 1, 1), kind, exif=exif, quality=100, lossless=True)


def transparent() -> bytes:
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    return encode(image)


def palette(transparency: int | None = None) -> bytes:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, *RED])
    return encode(image) if transparency is None else encode(image, transparency=transparency)


def deep_gray(level: int) -> bytes:
    return encode(Image.fromarray(np.full((SIDE, SIDE), level, dtype=np.uint16)))


def cmyk() -> bytes:
    return encode(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG whose header claims a size and whose pixels are `data`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    )


def deep_colour() -> bytes:
    """Return a 16-bit RGB PNG, which Pillow cannot write."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">HHH", 65535, 0, 0) * SIDE) * SIDE
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def animated(kind: str) -> bytes:
    return encode(corner(RED, 0, 0), kind, save_all=True, append_images=[corner(RED, 1, 1)])


def photo_with_preview() -> bytes:
    """Return an MPO, the JPEG of many phones: the photo, and a preview behind it."""
    return encode(corner(RED, 0, 0), "MPO", save_all=True, append_images=[corner(RED, 1, 1)])


SOUND: dict[str, tuple[Picture, str]] = {
    "png": (lambda: encode(corner(RED, 0, 0)), "red"),
    "jpeg": (lambda: encode(corner(RED, 0, 0), "JPEG", subsampling=0, quality=95), "red"),
    "progressive jpeg": (
        lambda: encode(corner(RED, 0, 0), "JPEG", progressive=True, subsampling=0, quality=95),
        "red",
    ),
    "webp": (lambda: encode(corner(RED, 0, 0), "WEBP", lossless=True), "red"),
    "orientation kept": (lambda: encode(corner(RED, 1, 1)), "white"),
    "rotated png": (lambda: rotated("PNG"), "red"),
    "rotated jpeg": (lambda: rotated("JPEG"), "red"),
    "rotated webp": (lambda: rotated("WEBP"), "red"),
    "transparent is white": (transparent, "white"),
    "palette": (palette, "red"),
    "palette with transparency is white": (lambda: palette(1), "white"),
    "gray": (lambda: encode(flat(255)), "white"),
    "gray with alpha": (lambda: encode(Image.new("LA", (SIDE, SIDE), (0, 0))), "white"),
    "bilevel": (lambda: encode(Image.new("1", (SIDE, SIDE), 1)), "white"),
    "16-bit white": (lambda: deep_gray(65535), "white"),
    "16-bit black": (lambda: deep_gray(200), "black"),
    "16-bit colour": (deep_colour, "red"),
    "cmyk jpeg": (cmyk, "red"),
    "interlaced png": (lambda: encode(corner(RED, 0, 0), interlace=1), "red"),
    "photo with preview": (photo_with_preview, "red"),
    "one pixel": (lambda: encode(Image.new("RGB", (1, 1), RED)), "red"),
    "one row": (lambda: encode(Image.new("RGB", (3000, 1), RED)), "red"),
    "large": (lambda: encode(Image.new("RGB", (2000, 1500), RED), "JPEG"), "red"),
}


def scans_without_end() -> bytes:
    """A JPEG that repeats its last scan 200 times: a few bytes each, a pass over all pixels."""
    data = encode(corner(RED, 0, 0), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + 200 * data[at:-2] + data[-2:]


UNSOUND: dict[str, tuple[Picture, str]] = {
    "empty": (lambda: b"", "empty_image"),
    "junk": (lambda: b"not an image at all", "not_an_image"),
    "signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "not_an_image"),
    "truncated png": (lambda: encode(corner(RED, 0, 0))[:-30], "broken_image"),
    "truncated jpeg": (lambda: encode(corner(RED, 0, 0), "JPEG")[:-40], "broken_image"),
    "truncated webp": (lambda: encode(corner(RED, 0, 0), "WEBP")[:-20], "broken_image"),
    "corrupt png": (
        lambda: encode(corner(RED, 0, 0)).replace(b"IDAT", b"IDAT\xff", 1),
        "broken_image",
    ),
    "png without pixels": (lambda: png_claiming(8, 8), "broken_image"),
    "no width": (lambda: png_claiming(0, 8), "not_an_image"),
    "gif": (lambda: encode(flat(0), "GIF"), "not_an_image"),
    "bmp": (lambda: encode(flat(0), "BMP"), "not_an_image"),
    "tiff": (lambda: encode(flat(0), "TIFF"), "not_an_image"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "pickle": (lambda: b"\x80\x04\x95\x00\x00\x00", "not_an_image"),
    "url": (lambda: b"http://127.0.0.1/secret.png", "not_an_image"),
    "animated png": (lambda: animated("PNG"), "animated_image"),
    "animated webp": (lambda: animated("WEBP"), "animated_image"),
    "claims to be huge": (lambda: png_claiming(60000, 60000), "image_too_large"),
    "bomb": (lambda: png_claiming(20000, 20000, bytes(1_000_000)), "image_too_large"),
    "scans without end": (scans_without_end, "broken_image"),
    "just too large": (lambda: encode(Image.new("1", (4097, 4096))), "image_too_large"),
}


def test_flat_pictures_cannot_cost_a_minute_for_a_megabyte(colours: Server) -> None:
    """A scan or a picture of 16 million pixels takes a few bytes, and a good part of a second."""
    large = Image.new("L", (4096, 4096))
    progressive = encode(large, "JPEG", progressive=True)
    at = progressive.rindex(b"\xff\xda")
    many = progressive[:at] + 40 * progressive[at:-2] + progressive[-2:]
    answer = httpx.post(f"{colours.url}/predict", content=many, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "broken_image")
    files = [("images", encode(large.convert("1")))] * 5
    answer = httpx.post(f"{colours.url}/predict", files=files, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")
    assert answer.json()["error"]["message"].startswith("image 5 of 5: ")
    assert httpx.post(f"{colours.url}/predict", files=files[:4], timeout=60).status_code == 200


@pytest.mark.parametrize("kind", SOUND)
def test_sound_pictures_are_seen_as_they_are(colours: Server, kind: str) -> None:
    picture, label = SOUND[kind]
    answer = httpx.post(f"{colours.url}/predict", content=picture())
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["label"] == label


@pytest.mark.parametrize("kind", UNSOUND)
def test_unsound_pictures_are_refused_in_words(colours: Server, kind: str) -> None:
    picture, code = UNSOUND[kind]
    answer = httpx.post(f"{colours.url}/predict", content=picture())
    assert (answer.status_code, answer.json()["error"]["code"]) == (CODES[code], code)
    assert httpx.get(f"{colours.url}/readyz").status_code == 200


def test_bad_requests_never_harm_their_neighbours(colours: Server) -> None:
    """200 sound and 200 unsound pictures at once, all answered rightly."""
    sound = [(picture(), label) for picture, label in SOUND.values()]
    unsound = [(picture(), code) for picture, code in UNSOUND.values()]

    async def run() -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:

            async def ask(body: bytes, expected: str) -> tuple[str, str]:
                answer = (await client.post(f"{colours.url}/predict", content=body)).json()
                if "error" in answer:
                    return expected, answer["error"]["code"]
                return expected, answer["predictions"][0]["label"]

            jobs = []
            for number in range(200):
                jobs.append(ask(*sound[number % len(sound)]))
                jobs.append(ask(*unsound[number % len(unsound)]))
            return await asyncio.gather(*jobs)

    outcomes = asyncio.run(run())
    assert len(outcomes) == 400
    assert [outcome for outcome in outcomes if outcome[0] != outcome[1]] == []
