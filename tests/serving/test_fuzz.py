"""Damaged images, multipart and tensors: refused in words, never a crash."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dverge_serve.images import Preprocess
from dverge_serve.serving.decoding import decode
from dverge_serve.serving.multipart import image_files
from dverge_serve.serving.oip_tensors import Inference, read_inference
from dverge_serve.serving.responses import ServiceError
from tests.serving.figures import tell
from tests.serving.test_pictures import SOUND, UNSOUND

GRAY = Preprocess(mode="L", resize=(8, 8), crop=(8, 8))
COLOUR = Preprocess(mode="RGB", resize=(40, 40), crop=(32, 32))
MAX_PIXELS = 4_000_000


def mutations(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few of its bytes flipped, cut, doubled, or swapped for another's."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 20)]
        elif kind == 4:
            other = rng.choice(seeds)
            start = rng.randrange(max(1, len(other)))
            data[at : at + 30] = other[start : start + 30]
        else:
            del data[at:]
    return bytes(data)


def image_seeds() -> list[bytes]:
    pictures = [make() for make, _ in (*SOUND.values(), *UNSOUND.values())]
    return [data for data in pictures if len(data) < 20_000]


def fuzz_images(count: int) -> tuple[int, int]:
    """Decode `count` damaged images; returns how many were taken, and refused."""
    rng, seeds = random.Random(20), image_seeds()
    taken, statuses = 0, []
    for number in range(count):
        data = mutations(rng, seeds)
        preprocess = COLOUR if number % 2 else GRAY
        try:
            pixels = decode([data], preprocess, MAX_PIXELS)
        except ServiceError as error:
            statuses.append(error.status)
        else:
            assert pixels.shape == (1, *preprocess.shape)
            taken += 1
    assert set(statuses) <= {400, 413}
    return taken, len(statuses)


def test_damaged_images_are_taken_or_refused() -> None:
    taken, refused = fuzz_images(3_000)
    assert taken > 50
    assert refused > 100


@pytest.mark.long
def test_100_000_damaged_images() -> None:
    count = int(os.environ.get("FUZZ_IMAGES", "100000"))
    taken, refused = fuzz_images(count)
    assert taken + refused == count
    figures = f"{taken} taken, {refused} refused in words, 0 crashes"
    tell(f"fuzz, {count} damaged images", figures, "damaged")


BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\ncontent-disposition: form-data; name="images"\r\n\r\nxyz\r\n--b--\r\n'
TENSOR = json.dumps(
    {
        "inputs": [
            {"name": "images", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 0.5, 0.25]}
        ],
        "outputs": [{"name": "index", "parameters": {"binary_data": True}}],
    }
).encode()


def read_tensor(data: bytes) -> Inference:
    return read_inference(
        data, None, name="images", shape=(1, 2, 2), max_images=4, outputs=["index", "label"]
    )


@pytest.mark.parametrize(
    ("seed", "read"),
    [(PART, lambda data: image_files(data, BOUNDARY, 4)), (TENSOR, read_tensor)],
    ids=["multipart", "tensor"],
)
def test_damaged_requests_are_taken_or_refused(
    seed: bytes, read: Callable[[bytes], object]
) -> None:
    rng = random.Random(20)
    outcomes = set()
    for _ in range(5_000):
        try:
            read(mutations(rng, [seed]))
            outcomes.add("taken")
        except ServiceError as error:
            outcomes.add(error.code)
    assert "taken" in outcomes
    assert len(outcomes) >= 2


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_at_all(data: bytes) -> None:
    with pytest.raises(ServiceError):
        decode([data], GRAY, MAX_PIXELS)
    with pytest.raises(ServiceError):
        image_files(data, BOUNDARY, 4)
    with pytest.raises(ServiceError):
        read_tensor(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(
    st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    json_values,
    st.sampled_from(["id", "outputs", "parameters", "inputs", "other"]),
    json_values,
)
@settings(max_examples=500, deadline=None)
def test_any_json_at_all(key: str, value: object, outer: str, outer_value: object) -> None:
    request = json.loads(TENSOR)
    request["inputs"][0][key] = value
    for changed in (request, {**request, outer: outer_value}):
        with contextlib.suppress(ServiceError):
            assert read_tensor(json.dumps(changed).encode()).images.shape[1:] == (1, 2, 2)
