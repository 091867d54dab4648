"""No input costs much more than it weighs: time and memory against size, for every kind of input.

Time is that of the thread, the least of a few tries where the first is too long: a busy or slow
machine changes little, and the bounds leave room besides.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
FIRST_S, S_PER_BYTE = 0.05, 0.08e-6
FIRST_BYTES, BYTES_PER_BYTE = 4_000_000, 10
# Slower, and known to be: numbers below 1e-307, which msgspec rounds with long arithmetic, and
# Pillow's reading of EXIF, of which there are 65,535 tags at most.
SLOW = {"sound JSON, hard": 0.8e-6, "image, png: exif of many tags": 0.4e-6}
TRIES = 3
SIZE = 1_000_000
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
    # What a test run adds is not the body's cost: passes of the collector over what other tests
    # have left in memory, and the tracer that counts the lines that ran.
    tracer = sys.gettrace()
    sys.settrace(None)
    gc.freeze()
    begun = time.thread_time()
    with contextlib.suppress(ServiceError):
        work(body)
    seconds = time.thread_time() - begun
    gc.unfreeze()
    sys.settrace(tracer)
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
    most = FIRST_S + SLOW.get(kind, S_PER_BYTE) * content
    for _ in range(TRIES):
        seconds, peak = cost(work, body)
        if seconds < most:
            break
    assert seconds < most, f"{seconds:.2f} s for {len(body)} bytes"
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


@dataclass
class Answer:
    """One answer to `/livez`: seconds until it came, and seconds that the worker computed then."""

    waited: float
    worked: float

    @property
    def blame(self) -> float:
        """What of the wait may be the service's own: the rest is that of a busy machine."""
        return min(self.waited, self.worked)


@contextlib.contextmanager
def probing(server: Server) -> Iterator[list[Answer]]:
    """Ask for `/livez` all the while; gives the answers."""
    stop, answers = threading.Event(), []
    (worker,) = server.workers()

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                begun, before = time.monotonic(), worker.cpu_times()
                assert client.get(f"{server.url}/livez").status_code == 200
                waited, after = time.monotonic() - begun, worker.cpu_times()
                worked = after.user - before.user + after.system - before.system
                answers.append(Answer(waited, worked))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("target")
    tiny.save_gray_model(folder / "model.onnx")
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def large_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for images of 256x256, of which long JSON may hold a whole one."""
    folder = tmp_path_factory.mktemp("large")
    tiny.save_gray_model(folder / "model.onnx", side=256)
    with serving(folder) as running:
        yield running


INFER = "/v2/models/dverge/infer"
ROUTES = {
    "JSON": (INFER, {"content-type": "application/json"}),
    "sound JSON": (INFER, {"content-type": "application/json"}),
    "JSON for large images": (INFER, {"content-type": "application/json"}),
    "gzip": (INFER, {"content-encoding": "gzip"}),
    "deflate": (INFER, {"content-encoding": "deflate"}),
    "multipart": ("/predict", {"content-type": "multipart/form-data; boundary=B"}),
    "image": ("/predict", {"content-type": "application/octet-stream"}),
}
LONGEST_HEADER = 60_000


LARGE = [kind for kind in CASES if kind.startswith(("sound JSON", "JSON for large images"))]
SMALL = [kind for kind in CASES if kind not in LARGE]


def send(server: Server, kind: str, size: int) -> None:
    grow = CASES[kind][1]
    family = kind.partition(", ")[0]
    if family == "content type":
        path, body = "/predict", b""
        headers = {"content-type": grow(min(size, LONGEST_HEADER)).decode("latin-1")}
    else:
        path, headers = ROUTES[family]
        body = grow(size if family not in ("gzip", "deflate") else size // 50)
    answer = httpx.post(server.url + path, content=body, headers=headers, timeout=60)
    assert answer.status_code in (200, 400, 413, 415), (kind, answer.text)


def test_others_are_answered_meanwhile(target: Server) -> None:
    """On a machine as busy as this one may be; the long form is for one that is idle."""
    with probing(target) as answers:
        for kind in SMALL:
            send(target, kind, 1_000_000)
    assert max(answer.waited for answer in answers) < 2
    (worker,) = target.workers()
    assert worker.memory_info().rss < 600_000_000


@pytest.mark.long
def test_the_cost_to_others_of_the_largest_inputs(target: Server, large_target: Server) -> None:
    answers: list[Answer] = []
    for server, kinds in ((target, SMALL), (large_target, LARGE)):
        with probing(server) as found:
            for kind in kinds:
                send(server, kind, 8_000_000)
        answers += found
    slowest, worst = (
        1000 * max(each) for each in zip(*((a.waited, a.blame) for a in answers), strict=True)
    )
    tell(
        "answers to /livez while 8 MB bodies of every hostile kind come in",
        f"{len(answers)} answers, the slowest after {slowest:.0f} ms; "
        f"of any wait the service computed for {worst:.0f} ms at most",
        "cost",
    )
    assert worst < 100
