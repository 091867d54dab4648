"""No input costs much more than it weighs: time and memory against size, for every kind of input.

Time is that of the thread, so that a busy machine changes little; the bounds leave room besides.
"""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import httpx
import pytest

from dverge_serve.images import Preprocess
from dverge_serve.serving.content_coding import unpack
from dverge_serve.serving.decoding import decode
from dverge_serve.serving.multipart import image_files
from dverge_serve.serving.oip_tensors import read_inference
from dverge_serve.serving.responses import ServiceError
from tests.serving import tiny
from tests.serving.figures import tell
from tests.serving.hostile import IMAGES, JSON, MULTIPART, TYPES, Grow, around
from tests.serving.server import Server, serving

# Seconds of one core, and bytes of memory beyond the body: so much at first, and for each byte.
FIRST_S, S_PER_BYTE = 0.1, 0.4e-6
FIRST_BYTES, BYTES_PER_BYTE = 8_000_000, 24
SIZE = 400_000
LIMIT = 8_388_608
GRAY = Preprocess(mode="L", resize=(8, 8), crop=(8, 8))


def infer(body: bytes) -> object:
    return read_inference(
        body, None, name="images", shape=(1, 8, 8), max_images=64, outputs=["label"]
    )


def infer_large(body: bytes) -> object:
    """As for a model of images so large that the body holds less than one."""
    return read_inference(
        body, None, name="images", shape=(3, 4096, 4096), max_images=64, outputs=["label"]
    )


def numbers(item: bytes, side: int = 8) -> Grow:
    """Return what makes a sound batch of as many images as fit."""

    def grow(size: int) -> bytes:
        count = max(1, min(64, size // ((len(item) + 1) * side**2)))
        text = b"[" + b",".join([item] * (count * side**2)) + b"]"
        shape = b"[%d,1,%d,%d]" % (count, side, side)
        return around(text, side).replace(b"[1,1,%d,%d]" % (side, side), shape)

    return grow


def infer_256(body: bytes) -> object:
    return read_inference(
        body, None, name="images", shape=(1, 256, 256), max_images=64, outputs=["label"]
    )


def part(body: bytes) -> object:
    return image_files(body, "multipart/form-data; boundary=B", 64)


def typed(header: bytes) -> object:
    return image_files(b"", header.decode("latin-1"), 64)


def picture(body: bytes) -> object:
    return decode([body], GRAY, 16_777_216)


def unpacked(coding: bytes) -> Callable[[bytes], object]:
    return lambda body: unpack(body, coding, LIMIT)


CASES: dict[str, tuple[Callable[[bytes], object], Grow]] = {
    **{f"JSON, {name}": (infer, grow) for name, grow in JSON.items()},
    **{f"JSON for large images, {name}": (infer_large, grow) for name, grow in JSON.items()},
    "sound JSON": (infer_256, numbers(b"0.12345678", 256)),
    "sound JSON, short": (infer_256, numbers(b"0", 256)),
    "sound JSON, hard": (infer_256, numbers(b"2.2250738585072011e-308", 256)),
    **{f"multipart, {name}": (part, grow) for name, grow in MULTIPART.items()},
    **{f"content type, {name}": (typed, grow) for name, grow in TYPES.items()},
    **{f"image, {name}": (picture, grow) for name, grow in IMAGES.items()},
    "gzip": (unpacked(b"gzip"), lambda size: gzip.compress(bytes(1000 * size))),
    "deflate": (unpacked(b"deflate"), lambda size: zlib.compress(bytes(1000 * size))),
}


def cost(work: Callable[[bytes], object], body: bytes) -> tuple[float, int]:
    """Return the seconds of this thread and the peak of Python's memory that a body costs."""
    begun = time.thread_time()
    with contextlib.suppress(ServiceError):
        work(body)
    seconds = time.thread_time() - begun
    tracemalloc.start()
    try:
        with contextlib.suppress(ServiceError):
            work(body)
        return seconds, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check(kind: str, size: int) -> tuple[float, int]:
    work, grow = CASES[kind]
    body = grow(size)
    content = LIMIT if kind in ("gzip", "deflate") else len(body)
    seconds, peak = cost(work, body)
    assert seconds < FIRST_S + S_PER_BYTE * content, f"{seconds:.2f} s for {len(body)} bytes"
    assert peak < FIRST_BYTES + BYTES_PER_BYTE * content, f"{peak} for {len(body)} bytes"
    return seconds, peak


@pytest.mark.parametrize("kind", CASES)
def test_no_input_costs_much_more_than_it_weighs(kind: str) -> None:
    check(kind, SIZE if kind not in ("gzip", "deflate") else SIZE // 50)


@pytest.mark.long
def test_the_cost_of_the_largest_inputs() -> None:
    worst = {}
    for kind in CASES:
        for size in (1_000_000, 3_000_000, 8_000_000):
            seconds, peak = check(kind, size if kind not in ("gzip", "deflate") else size // 50)
            worst[kind] = seconds, peak
    slowest = max(worst, key=lambda kind: worst[kind][0])
    largest = max(worst, key=lambda kind: worst[kind][1])
    tell(
        f"cost of {len(CASES)} kinds of hostile input, 8 MB each",
        f"slowest: {slowest}, {worst[slowest][0]:.2f} s; "
        f"largest: {largest}, {worst[largest][1] / 1e6:.0f} MB",
        "cost",
    )


@contextlib.contextmanager
def probing(server: Server) -> Iterator[list[float]]:
    """Ask for `/livez` all the while; gives the times of the answers, in seconds."""
    stop, times = threading.Event(), []

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                begun = time.monotonic()
                assert client.get(f"{server.url}/livez").status_code == 200
                times.append(time.monotonic() - begun)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("target")
    tiny.save_gray_model(folder / "model.onnx")
    with serving(folder) as running:
        yield running


ROUTES = {
    "JSON": ("/v2/models/dverge/infer", "application/json"),
    "multipart": ("/predict", "multipart/form-data; boundary=B"),
    "image": ("/predict", "application/octet-stream"),
}


def send_all(server: Server, size: int) -> None:
    for kind, (_, grow) in CASES.items():
        path, content_type = ROUTES.get(kind.partition(", ")[0], (None, ""))
        if path is not None:
            headers = {"content-type": content_type}
            answer = httpx.post(server.url + path, content=grow(size), headers=headers, timeout=60)
            assert answer.status_code in (200, 400, 413), (kind, answer.text)


def test_others_are_answered_meanwhile(target: Server) -> None:
    """On a machine as busy as this one may be; the long form is for one that is idle."""
    with probing(target) as times:
        send_all(target, 1_000_000)
    assert max(times) < 2
    (worker,) = target.workers()
    assert worker.memory_info().rss < 600_000_000


@pytest.mark.long
def test_the_cost_to_others_on_an_idle_machine(target: Server) -> None:
    with probing(target) as times:
        send_all(target, 8_000_000)
    tell(
        "answers to /livez while 8 MB bodies of every hostile kind come in",
        f"{len(times)} answers, the slowest after {1000 * max(times):.0f} ms",
        "cost",
    )
    assert max(times) < 0.1
