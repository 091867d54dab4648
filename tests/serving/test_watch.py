"""The watch for attacks by queries: what it counts, what it leaves alone, and what it answers."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dverge_serve.images import to_float
from dverge_serve.serving import watch
from dverge_serve.serving.logs import LOGGER
from dverge_serve.serving.watch import (
    HASHES,
    LATEST,
    PERIOD_S,
    SHARED,
    Fingerprint,
    NearCopies,
)
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.refusal import refusal
from tests.serving.tiny import PNG

Pixels = npt.NDArray[np.uint8]
BUDGET = 5
RNG = np.random.default_rng(0)


def picture(side: int = 32, channels: int = 3) -> Pixels:
    """Return an image `[C, H, W]` with as much texture as there can be at 32 pixels."""
    block = max(1, side // 32)
    small = RNG.integers(0, 256, (channels, -(-side // block), -(-side // block)), dtype=np.uint8)
    return np.kron(small, np.ones((1, block, block), np.uint8))[:, :side, :side]


def copies(image: Pixels, count: int) -> Iterator[Pixels]:
    """Yield different near-copies of an image: two pixels changed in each."""
    places = np.ndindex(*image.shape[1:])
    for _, (row, column) in zip(range(count), places, strict=False):
        made = image.copy()
        made[:, row, column] ^= 255
        made[:, -1, -1] ^= 128
        yield made


def shared(fingerprint: Fingerprint, one: Pixels, other: Pixels) -> int:
    first, second = fingerprint(np.stack([one, other]))
    return len(set(first) & set(second))


@pytest.mark.parametrize("side", [8, 32, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_near_copies_share_hashes_and_other_images_do_not(side: int, channels: int) -> None:
    fingerprint, image = Fingerprint(), picture(side, channels)
    (near,) = copies(image, 1)
    assert shared(fingerprint, image, image) == HASHES
    assert shared(fingerprint, image, near) >= SHARED
    assert shared(fingerprint, image, picture(side, channels)) < SHARED


def fingerprints(count: int) -> list[Fingerprint]:
    return [Fingerprint() for _ in range(count)]


def test_noise_far_below_a_bin_and_a_shift_leave_a_near_copy() -> None:
    rows, columns = np.mgrid[:32, :32]
    image = np.stack([127 + 120 * np.sin(rows / 3) * np.cos(columns / k) for k in (4, 5, 6)])
    noisy = image + RNG.uniform(-8, 8, image.shape)
    sent = [np.clip(np.rint(each), 0, 255).astype(np.uint8) for each in (image, noisy)]
    moved = sent[0], np.roll(sent[0], 1, axis=2)
    # Random numbers of its own: with some of them an edge between bins is where the noise is.
    found = [[shared(each, *pair) for each in fingerprints(25)] for pair in (sent, moved)]
    assert np.median(found, axis=1).min() >= SHARED


def test_floats_and_8_bits_of_one_image_have_one_fingerprint() -> None:
    image = picture()[None]
    fingerprint = Fingerprint()
    (ours,), (theirs,) = fingerprint(image), fingerprint(to_float(image))
    assert len(set(ours) & set(theirs)) >= HASHES - 2  # a pixel on the edge of a bin


def test_images_without_texture_are_not_watched() -> None:
    fingerprint = Fingerprint()
    for level in (0, 100, 255):
        assert fingerprint(np.full((1, 3, 32, 32), level, np.uint8)) == [[]]
    assert fingerprint(np.zeros((2, 1, 2, 2), np.uint8)) == [[], []]
    seen = NearCopies(1)
    for level in range(5):
        assert seen.see(np.full((1, 3, 32, 32), level, np.uint8))[0].copies == 0


def test_every_start_has_random_numbers_of_its_own() -> None:
    image = picture()[None]
    one, other = Fingerprint(), Fingerprint()
    assert not set(one(image)[0]) & set(other(image)[0])


def test_near_copies_are_over_the_budget_after_it() -> None:
    seen, image = NearCopies(BUDGET), picture()
    assert seen.see(image[None])[0].copies == 0
    found = [seen.see(each[None])[0] for each in copies(image, BUDGET + 3)]
    assert [each.copies for each in found] == list(range(1, BUDGET + 4))
    assert [each.wait_s > 0 for each in found] == [False] * BUDGET + [True] * 3
    # An operator hears of it at once, and then as the number doubles.
    assert [each.told for each in found[BUDGET:]] == [True, False, False]


def test_images_of_one_request_count_one_by_one() -> None:
    seen, image = NearCopies(BUDGET), picture()
    found = seen.see(np.stack([image, *copies(image, BUDGET + 1)]))
    assert [each.wait_s > 0 for each in found] == [False] * (BUDGET + 1) + [True]


def test_exact_copies_do_not_count() -> None:
    seen, image = NearCopies(BUDGET), picture()
    near = next(copies(image, 1))
    for _ in range(10 * BUDGET):
        assert seen.see(image[None])[0].copies == 0
    assert seen.see(near[None])[0].copies == 1
    for _ in range(10 * BUDGET):
        assert seen.see(near[None])[0].copies == 0


def test_different_images_do_not_count() -> None:
    seen = NearCopies(1)
    assert not any(seen.see(picture()[None])[0].copies for _ in range(300))


def test_the_budget_comes_back_in_a_day() -> None:
    now = [0.0]
    seen, image = NearCopies(BUDGET, clock=lambda: now[0]), picture()
    made = copies(image, 4 * BUDGET)
    seen.see(image[None])
    for _ in range(BUDGET):
        assert seen.see(next(made)[None])[0].wait_s == 0
    wait = seen.see(next(made)[None])[0].wait_s
    assert wait == pytest.approx(PERIOD_S / BUDGET)
    now[0] += 0.99 * wait
    assert seen.see(next(made)[None])[0].wait_s > 0
    now[0] += 0.02 * wait
    assert seen.see(next(made)[None])[0].wait_s == 0
    now[0] += PERIOD_S
    found = [seen.see(next(made)[None])[0] for _ in range(BUDGET + 1)]
    assert [each.wait_s > 0 for each in found] == [False] * BUDGET + [True]


def test_it_follows_an_attack_that_drifts_away_from_its_image() -> None:
    seen, image = NearCopies(BUDGET), picture()
    first = image.copy()
    seen.see(image[None])
    for row in range(32):
        image = image.copy()
        image[:, row] ^= 255
        found = seen.see(image[None])[0]
        assert found.copies == row + 1
        (family,) = seen._families
        assert set(seen._index) == set().union(*family.fingerprints)
    assert shared(Fingerprint(), first, image) < SHARED


def test_memory_is_bounded() -> None:
    limit = 50
    seen = NearCopies(BUDGET, remembered=limit)
    attacked = picture()
    near = copies(attacked, 1000)
    seen.see(attacked[None])
    for number in range(4 * limit):
        seen.see(picture()[None])
        if number % 10 == 0:
            # What is sent again and again is not what is forgotten.
            assert seen.see(next(near)[None])[0].copies == number // 10 + 1
    assert seen._kept == sum(len(each.fingerprints) for each in seen._families) <= limit
    assert len(seen._index) <= limit * HASHES
    assert all(len(each.fingerprints) <= LATEST for each in seen._families)
    assert all(len(each.pixels) <= watch.PIXELS_SEEN for each in seen._families)
    assert set(seen._index.values()) <= set(seen._families)


def test_what_was_forgotten_is_new_again() -> None:
    seen, image = NearCopies(BUDGET, remembered=10), picture()
    seen.see(image[None])
    for _ in range(10):
        seen.see(picture()[None])
    assert seen.see(next(copies(image, 1))[None])[0].copies == 0


def test_threads_count_every_copy_once() -> None:
    seen, image = NearCopies(BUDGET), picture()
    seen.see(image[None])
    made = list(copies(image, 400))
    found: list[int] = []

    def send(part: list[Pixels]) -> None:
        found.extend(seen.see(each[None])[0].copies for each in part)

    threads = [threading.Thread(target=send, args=(made[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 401))


# The service: the gray model takes 8 x 8.


def png(pixels: Pixels) -> bytes:
    return tiny.encode(Image.fromarray(pixels[0]))


def tensor(pixels: Pixels) -> bytes:
    data = to_float(pixels[None]).ravel().tolist()
    entry = {"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": data}
    return json.dumps({"inputs": [entry]}).encode()


async def counted(client: httpx.AsyncClient) -> list[float]:
    text = (await client.get("/metrics")).text
    values = dict(line.split(" ") for line in text.splitlines() if line.startswith("dverge_near"))
    names = ("dverge_near_copies_total", "dverge_near_copies_over_budget_total")
    return [float(values[name]) for name in names]


@pytest.fixture
def warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.anyio
async def test_observe_answers_counts_and_tells_the_operator(
    start: Start, warnings: pytest.LogCaptureFixture
) -> None:
    client, image = await start(watch_budget=BUDGET), picture(8, 1)
    answers = []
    for each in [image, *copies(image, BUDGET + 2)]:
        answers.append(await client.post("/predict", content=png(each), headers=PNG))
    assert {answer.status_code for answer in answers} == {200}
    told = [answer.headers.get("x-near-copies") for answer in answers]
    assert told == [None] * (BUDGET + 1) + [str(BUDGET + 1), str(BUDGET + 2)]
    assert await counted(client) == [BUDGET + 2, 2]
    (line,) = (text for text in warnings.messages if "near-copies" in text)
    assert answers[BUDGET + 1].headers["x-request-id"] in line


@pytest.mark.anyio
async def test_callers_who_see_less_are_not_told(start: Start) -> None:
    client, image = await start(watch_budget=BUDGET, expose="scores"), picture(8, 1)
    for each in [image, *copies(image, BUDGET + 2)]:
        answer = await client.post("/predict", content=png(each), headers=PNG)
        assert "x-near-copies" not in answer.headers
    assert (await counted(client))[1] == 2


@pytest.mark.anyio
async def test_refuse_answers_429_on_every_way_to_an_answer(start: Start) -> None:
    client, image = await start(watch="refuse", watch_budget=BUDGET), picture(8, 1)
    *made, last = copies(image, BUDGET + 3)
    # The budget is of the image, whatever way its copies come, and from whomever.
    for each in [image, *made[: BUDGET - 1]]:
        assert (await client.post("/predict", content=png(each), headers=PNG)).status_code == 200
    json_type = {"content-type": "application/json"}
    infer = "/v2/models/dverge/infer"
    sent = await client.post(infer, content=tensor(made[BUDGET - 1]), headers=json_type)
    assert sent.status_code == 200
    refused = await client.post("/predict", content=png(made[BUDGET]), headers=PNG)
    assert "nearly the same" in refusal(refused, "near_copies")
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= PERIOD_S / BUDGET + 1
    version = (await client.get("/v2/models/dverge")).json()["versions"][0]
    for path in (infer, f"/v2/models/dverge/versions/{version}/infer"):
        answer = await client.post(path, content=tensor(made[BUDGET + 1]), headers=json_type)
        assert answer.status_code == 429
        assert answer.headers["x-error-code"] == "near_copies"
        assert "retry-after" in answer.headers
    files = [("images", png(each)) for each in (picture(8, 1), last)]
    refusal(await client.post("/predict", files=files), "near_copies")
    # What was refused stays refused; what was answered is answered again, and so are others.
    refusal(await client.post("/predict", content=png(made[BUDGET]), headers=PNG), "near_copies")
    for each in (picture(8, 1), image, made[0]):
        assert (await client.post("/predict", content=png(each), headers=PNG)).status_code == 200
    metrics = (await client.get("/metrics")).text
    assert 'dverge_refusals_total{code="near_copies"} 5.0' in metrics


@pytest.mark.anyio
async def test_large_requests_are_looked_at_off_the_loop(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dverge_serve.serving.classify.INLINE_PIXELS", 0)
    client, image = await start(watch="refuse", watch_budget=1), picture(8, 1)
    answers = [
        await client.post("/predict", content=png(each), headers=PNG)
        for each in (image, *copies(image, 2))
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 429]


@pytest.mark.anyio
async def test_off_sees_nothing(start: Start) -> None:
    client, image = await start(watch="off", watch_budget=1), picture(8, 1)
    for each in [image, *copies(image, 5)]:
        assert (await client.post("/predict", content=png(each), headers=PNG)).status_code == 200
    assert await counted(client) == [0, 0]
