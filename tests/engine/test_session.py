"""The engine: where it runs, many threads at once, buckets, slices, closing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dverge_serve.engine import providers as devices
from dverge_serve.engine.buckets import Buckets
from dverge_serve.engine.card import FusionMode, members_per_group
from dverge_serve.engine.cpu_parallel import part
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(tiny_model, device="cpu", threads=1)


def noise(count: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def gpu(monkeypatch: pytest.MonkeyPatch, *, provider: bool, driver: bool) -> None:
    found = [devices.CUDA, devices.CPU] if provider else [devices.CPU]
    monkeypatch.setattr(ort, "get_available_providers", lambda: found)
    monkeypatch.setattr(devices, "gpus", lambda: int(driver))


def test_a_gpu_asked_for_and_not_there_is_an_error(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, provider=False, driver=True)
    with pytest.raises(UserError, match=r"no CUDA provider.*pip uninstall"):
        Engine(tiny_model, device="cuda")
    gpu(monkeypatch, provider=True, driver=False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        Engine(tiny_model, device="cuda")
    with pytest.raises(UserError, match="no TensorRT provider"):
        Engine(tiny_model, device="tensorrt")
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        Engine(tiny_model, device="tpu")  # type: ignore[arg-type]


def test_auto_takes_what_is_there(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, provider=True, driver=True)
    assert devices.pick_device("auto") == "cuda"
    assert devices.pick_device("auto", "int8") == "cpu"
    (first, options), last = devices.providers("cuda", engine.card, 1)
    assert (first, options["device_id"], last) == (devices.CUDA, 1, devices.CPU)
    gpu(monkeypatch, provider=True, driver=False)
    assert devices.pick_device("auto") == "cpu"
    gpu(monkeypatch, provider=False, driver=True)
    assert devices.pick_device("auto") == "cpu"


def test_two_builds_of_the_runtime_are_told(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: [name])
    with pytest.warns(RuntimeWarning, match="both installed.*pip uninstall"):
        Engine(tiny_model, device="cpu")


def test_many_threads_get_their_own_answers(engine: Engine) -> None:
    batches = [noise(1 + seed % 7, seed) for seed in range(60)]
    alone = [engine.run(batch).logits for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: engine.run(batch).logits, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_closed_engine_refuses_and_running_calls_end_well(tiny_model: Path) -> None:
    with Engine(tiny_model, device="cpu", threads=2) as engine:
        expected = engine.run(noise(64)).logits
        answers, errors, begun = [], [], threading.Event()

        def call() -> None:
            try:
                while True:
                    answers.append(engine.run(noise(64)).logits)
                    begun.set()
            except RuntimeError as error:
                errors.append(str(error))

        caller = threading.Thread(target=call)
        caller.start()
        assert begun.wait(30)
    caller.join(30)
    assert not caller.is_alive()
    assert ["closed" in error for error in errors] == [True]
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)
    with pytest.raises(RuntimeError, match="is closed"):
        engine.run(noise(1))
    engine.close()  # twice is once


def test_lanes_answer_as_one_call_does(tiny_model: Path) -> None:
    alone = Engine(tiny_model, device="cpu", threads=1)
    shared = Engine(tiny_model, device="cpu", threads=3)
    lanes = shared._lanes
    assert lanes is not None
    assert alone._lanes is None
    assert [lanes.worth(count) for count in (1, 11, 12, 200)] == [False, False, True, True]
    for count in (1, 12, 13, 100):
        expected, found = alone.run(noise(count)), shared.run(noise(count))
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        np.testing.assert_allclose(found.member_logits, expected.member_logits, atol=1e-5)
        found = shared.run(noise(count), in_lane=True)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    assert (alone.lanes, shared.lanes, shared.lane_batch) == (1, 3, lanes.part)


@pytest.mark.parametrize(
    ("form", "members", "images"),
    [
        ("branches", 8, {8: 1024, 32: 64, 224: 1}),
        ("grouped", 3, {8: 256, 32: 16, 224: 1}),
        ("grouped", 8, {8: 256, 32: 16, 224: 1}),
    ],
)
def test_the_part_of_a_lane_fits_the_cache(
    engine: Engine, form: FusionMode, members: int, images: dict[int, int]
) -> None:
    for size, expected in images.items():
        shape = replace(engine.card.preprocess, crop=(size, size), resize=(size, size))
        card = replace(engine.card, preprocess=shape, form=form, members=members)
        assert part(card) == expected


def test_no_grouped_network_is_wider_than_four_members() -> None:
    assert [members_per_group(count) for count in range(1, 11)] == [1, 2, 3, 4, 3, 3, 4, 4, 3, 4]


def test_buckets_pad_and_split_and_answer_the_same(engine: Engine) -> None:
    buckets = Buckets(engine.session, engine.card, "cpu", 0)
    assert buckets.sizes == (1, 2, 4, 8, 16, 32, 64)
    runs: list[tuple[int, ...]] = []
    for count in (1, 3, 64, 65, 150):
        expected, found = engine.run(noise(count)), buckets.run(noise(count))
        assert len(found) == count
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        np.testing.assert_allclose(found.member_logits, expected.member_logits, atol=1e-5)
        runs.append(tuple(sorted(buckets._buckets)))
    assert runs[-1] == (1, 4, 32, 64)  # 150 = 64 + 64 + 22; nothing but powers of two was run
    first = buckets.run(noise(2, 1))
    kept = first.logits.copy()
    buckets.run(noise(2, 2))
    np.testing.assert_array_equal(first.logits, kept)  # an answer is not the next call's buffer


def test_buckets_from_many_threads(engine: Engine) -> None:
    buckets = Buckets(engine.session, engine.card, "cpu", 0)
    batches = [noise(1 + seed % 5, seed) for seed in range(40)]
    alone = [buckets.run(batch).logits for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: buckets.run(batch).logits, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
