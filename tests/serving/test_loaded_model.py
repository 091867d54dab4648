"""How a worker finds its place: cores, GPUs, threads; and what its thread does with a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from dverge_serve.cores import cores
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.serving import loaded_model as served
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.settings import Settings


def test_workers_spread_over_the_gpus(gray_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "gpus", lambda: 3)
    chosen = []

    class Seen(Engine):
        def __init__(self, path: Path, *, device_id: int = 0, **options: object) -> None:
            chosen.append(device_id)
            super().__init__(path, device="cpu", threads=1)

    monkeypatch.setattr(served, "Engine", Seen)
    for worker in range(1, 6):
        ServedModel(Settings(model=gray_model, workers=5), worker)
    assert chosen == [0, 1, 2, 0, 1]


def test_a_file_other_than_the_pinned_one_is_refused_naming_the_variable(gray_model: Path) -> None:
    with pytest.raises(UserError, match=r"as pinned.*change DVERGE_MODEL_SHA256"):
        ServedModel(Settings(model=gray_model, model_sha256="0" * 64))


@pytest.mark.parametrize(
    ("threads", "workers", "expected"), [(0, 1, cores()), (0, 1000, 1), (3, 2, 3)]
)
def test_the_cores_are_shared_out_among_the_workers(
    gray_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    workers: int,
    expected: int,
) -> None:
    seen = []

    class Seen(Engine):
        def __init__(self, path: Path, *, threads: int = 0, **options: object) -> None:
            seen.append(threads)
            super().__init__(path, device="cpu", threads=1)

    monkeypatch.setattr(served, "Engine", Seen)
    settings = Settings(model=gray_model, threads=threads, workers=min(workers, 256))
    ServedModel(settings)
    assert seen == [expected]
