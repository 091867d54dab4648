"""What the decoder takes and what it refuses: damage, other formats, animations, bombs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dverge_serve.images import ImageError, load
from tests.leaves.pictures import SIZE, encode, exactly, noise, smooth


def refusal(data: bytes, code: str, **more: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load(data, exactly("RGB"), **more)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
