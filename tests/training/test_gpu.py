"""The chunks of `benchmarks.gpu`, rehearsed: each knows only what the one before returned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu import archive, images, results, steps
from benchmarks.gpu.chunk import Chunk
from benchmarks.gpu.collect import collect
from benchmarks.gpu.jobs import JOBS, Plan, job_named
from dverge_serve.errors import UserError
from training.data.splits import load_training
from training.recipe import load_recipe
from training.runs.directory import Run
from training.trainer import train

ROOT = Path(__file__).parents[2]
# What the lent machine lacks, refused in every process of the rehearsal.
BLOCK = """
import sys
for name in ("bentoml", "_bentoml_sdk", "onnxruntime", "onnxscript", "typer", "starlette"):
    sys.modules[name] = None
"""
SETTINGS = {
    "architecture": "resnet8",
    "width": 8,
    "batch_size": 16,
    "precision": "fp32",
    "data.crop": [8, 8],
    "data.mean": [],
    "data.std": [],
    "standard.epochs": 6,
    "dverge.epochs": 2,
    "verification.eps": [0.1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few JPEGs of three colours."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 6)):
        for index, name in enumerate(("blue", "green", "red")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 60, (8, 8, 3), dtype=np.uint8)
                pixels[..., 2 - index] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def pack(folder: Path) -> Path:
    """The same as one file."""
    images.pack(folder, folder / "images.tar.xz")
    return folder / "images.tar.xz"


class Lent:
    """A bare machine: chunks run in processes that lack what the lent machine lacks.

    Args:
        folder: for what lies on it.
        pack: the images, carried along.
    """

    def __init__(self, folder: Path, pack: Path) -> None:
        self._folder, self._pack, self._number = folder, pack, 0
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(BLOCK)

    def start(self, state: Path | None, *more: str) -> tuple[subprocess.Popen[str], Path]:
        """Start a chunk on a machine that has seen none; return it, and what it will leave."""
        self._number += 1
        out = self._folder / f"out{self._number}"
        given = ["--images", str(self._pack), "--out", str(out), *more]
        given += ["--state", str(state)] if state else []
        given += ["--work", str(self._folder / f"work{self._number}")]
        given += ["--test-images", "12", "--layers", "1,9", "--rounds", "1", "--batch", "4"]
        given += ["--save-seconds", "0", "--keep-seconds", "0.1", "--device", "cpu"]
        for key, value in SETTINGS.items():
            given += ["--set", f"{key}={json.dumps(value)}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "run", *given],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(self._folder / "site")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return process, out

    def chunk(self, state: Path | None, *more: str) -> tuple[str, Path]:
        """Run a chunk to its end; return what it said, and what it left."""
        process, out = self.start(state, *more)
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        return said, out


@pytest.fixture
def lent(tmp_path: Path, pack: Path) -> Lent:
    return Lent(tmp_path, pack)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def holds(file: Path, name: str) -> bool:
    """Whether a returned run has a file of that name by now."""
    if not file.is_file():
        return False
    with zipfile.ZipFile(file) as found:
        return name in found.namelist()


def rehearse(lent: Lent, jobs: list[str]) -> Path:
    """Go through the jobs in several chunks, each from what the one before returned alone."""
    # Killed in the middle of a training.
    process, out = lent.start(None, "--only", "exact")
    while not holds(out / "exact.zip", "state.safetensors") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = read(out)["jobs"]["exact"]
    assert begun["done"] is False

    # Out of time before anything is begun: nothing is lost.
    said, out = lent.chunk(out, "--minutes", "0")
    assert "more to do: checks, steps, exact" in said
    assert read(out)["carry"] == ["exact"]
    assert read(out)["chunks"][-1]["worked_on"] == []

    # Out of time in the middle of something.
    said, out = lent.chunk(out, "--minutes", "0.12", "--only", *jobs)
    assert "more to do: " in said
    assert read(out)["chunks"][-1]["worked_on"][-1]["ended"] == "out of time"

    said, out = lent.chunk(out, "--minutes", "60", "--only", *jobs)
    failures = {name: entry["failures"] for name, entry in read(out)["jobs"].items()}
    assert {name: said for name, said in failures.items() if said} == {}, said
    assert len(list(out.iterdir())) <= 8
    return out


def test_chunks_go_on_from_what_the_one_before_returned(
    lent: Lent, folder: Path, tmp_path: Path
) -> None:
    out = rehearse(lent, ["steps", "exact", "surrogate", "attack-exact"])
    found = read(out)
    assert [name for name, entry in found["jobs"].items() if entry["done"]] == [
        "steps",
        "exact",
        "surrogate",
        "attack-exact",
    ]
    assert len(found["chunks"]) == 4
    assert torch.__version__.startswith(found["chunks"][-1]["machine"]["versions"]["torch"])

    timed = found["jobs"]["steps"]["found"]
    assert [row["layer"] for row in timed["rows"]] == [1, 9]
    assert timed["times"]["eager"] > 0
    assert timed["bars"] == found["bars"] == []  # those are for a GPU

    # The interrupted training made the members that an uninterrupted one makes.
    exact = found["jobs"]["exact"]["found"]
    assert [stage["epochs"] for stage in exact["stages"].values()] == [6, 2]
    assert all(len(stage["images_per_s"]) == stage["of"] for stage in exact["stages"].values())
    config = load_recipe("cifar10", {"data.name": "imagefolder", **SETTINGS})
    data = load_training(replace(config.data, path=str(folder)))
    run = train(config, tmp_path / "whole", device=torch.device("cpu"), data=data)
    assert exact["checkpoint"]["members_sha256"] == run.weights_sha256

    attacked = found["jobs"]["attack-exact"]["found"]
    assert attacked["weights_sha256"] == run.weights_sha256
    assert attacked["images"] == attacked["figures"]["clean_accuracy"]["n"] == 12
    (row,) = attacked["figures"]["robust_accuracy"]
    assert set(row["transfer"]["attacks"]) >= {"mpgd-ce from standard-3", "mpgd-cw from standard-3"}
    assert row["white_box"]["value"] <= attacked["figures"]["clean_accuracy"]["value"]
    assert attacked["outside"] == 0

    kept = collect(out, tmp_path / "kept", tmp_path / "runs")
    halves = load_file(tmp_path / "kept" / "exact.fp16.safetensors")
    assert {path.name for path in kept} == {
        "results.json",
        "exact.fp16.safetensors",
        "surrogate.fp16.safetensors",
    }
    for name, tensor in load_file(run.path / "members.safetensors").items():
        assert torch.equal(halves[name], tensor.half() if tensor.is_floating_point() else tensor)
    assert Run.open_finished(tmp_path / "runs" / "exact").weights_sha256 == run.weights_sha256


@pytest.mark.long
def test_all_jobs_of_all_chunks(lent: Lent) -> None:
    out = rehearse(lent, [job.name for job in JOBS])
    assert read(out)["done"]
    assert read(out)["carry"] == []
    assert read(out)["jobs"]["checks"]["found"]["code"] == 0
    five = read(out)["jobs"]["five"]["found"]
    assert len(five["stages"]["dverge"]["losses"][0]) == 5


class Echo:
    """Records by remembering the work: what a GPU does, without one."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        return work


@pytest.mark.parametrize("name", ["published", "recorded", "recorded_benchmark", "fp32_recorded"])
def test_a_way_to_step_is_ready_before_it_is_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Echo] = []

    def recorder(*given: object) -> Echo:
        made.append(Echo())
        return made[-1]

    monkeypatch.setattr(steps, "CudaRecorder", recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    device = torch.device("cpu")
    stepper = steps.Stepper(steps.WAYS[name], 2, device)
    batch = torch.rand(2, 3, 32, 32), torch.tensor([1, 2]), torch.rand(2, 3, 32, 32)
    assert stepper.ready(batch, 2) > 0
    recorded = [each.recorded for each in made]
    assert recorded == ([1] if steps.WAYS[name].recorded else [])
    assert stepper.seconds(batch, 2) > 0
    assert [each.recorded for each in made] == recorded


def test_the_bar_of_a_step_is_the_sum_over_all_layers() -> None:
    rows = [{"layer": 1, "published": 10.0, "recorded": 0.5}]
    rows.append({"layer": 2, "published": 20.0, "recorded": 1.5})
    (bar,) = steps.bars(rows)
    assert (bar["value"], bar["holds"]) == (15.0, True)
    assert steps.bars([{"layer": 1, "published": 10.0, "eager": 1.0}]) == []


def entry(*, done: bool = False, failed: int = 0, begun: bool = False) -> dict[str, Any]:
    failures = [{"code": 1, "said": []}] * failed
    return {"done": done, "failures": failures, **({"found": {}} if begun or done else {})}


def test_what_a_next_chunk_needs() -> None:
    table = results.empty()
    assert results.carried(table) == []
    table["jobs"] = {"exact": entry(begun=True)}
    assert results.carried(table) == ["exact"]
    table["jobs"] = {"exact": entry(done=True), "fast": entry(begun=True)}
    assert results.carried(table) == ["exact", "fast"]  # the one is still to be attacked
    table["jobs"] |= {name: entry(done=True) for name in ("fast", "surrogate", "attack-exact")}
    assert results.carried(table) == ["fast", "surrogate"]
    table["jobs"] |= {name: entry(done=True) for name in ("attack-fast", "five", "attack-five")}
    assert results.carried(table) == []


def test_the_bar_of_stage_two_is_for_the_whole_recipe_on_a_gpu() -> None:
    table = results.empty()
    stage = {"epochs": 200, "seconds": 900.0}
    table["jobs"] = {
        "exact": {"done": True, "failures": [], "found": {"stages": {"dverge": stage}}}
    }
    table["chunks"] = [{"machine": {"cores": 2}}]
    assert results.bars(table) == []
    table["chunks"].append({"machine": {"gpu": {"name": "one"}}})
    (found,) = results.bars(table)
    assert (found["value"], found["holds"]) == (15.0, True)
    stage["epochs"] = 2
    assert results.bars(table) == []


def test_a_job_that_fails_twice_is_given_up_with_all_that_need_it() -> None:
    table = results.empty()
    table["jobs"] = {"exact": entry(failed=1)}
    assert not results.over(table, job_named("attack-exact"))
    table["jobs"] = {"exact": entry(failed=2)}
    assert results.over(table, job_named("exact"))
    assert results.over(table, job_named("attack-exact"))
    assert not results.over(table, job_named("attack-fast"))


def test_a_run_travels_and_comes_back(tmp_path: Path, tiny_run: Path) -> None:
    size = archive.keep(tiny_run, tmp_path / "run.zip")
    assert (tmp_path / "run.zip").stat().st_size == size
    archive.restore(tmp_path / "run.zip", tmp_path / "run")
    names = {path.name for path in tiny_run.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tiny_run / name).read_bytes()


def test_a_run_too_large_to_travel_is_refused(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LARGEST", 1000)
    with pytest.raises(UserError, match="at most 1000"):
        archive.keep(tiny_run, tmp_path / "run.zip")
    assert not (tmp_path / "run.zip").exists()


def test_equal_images_make_equal_files(folder: Path, pack: Path, tmp_path: Path) -> None:
    images.unpack(pack, tmp_path / "there")
    images.unpack(pack, tmp_path / "there")
    images.pack(tmp_path / "there", tmp_path / "again.tar.xz")
    assert (tmp_path / "again.tar.xz").read_bytes() == pack.read_bytes()
    name = "test/red/3.jpg"
    assert (tmp_path / "there" / name).read_bytes() == (folder / name).read_bytes()


def test_mistakes_are_one_line_each(
    tmp_path: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(work=str(tmp_path / "work"))
    with pytest.raises(UserError, match="no images in"):
        images.pack(tmp_path, tmp_path / "none.tar.xz")
    monkeypatch.setattr(images, "LARGEST", 100)
    with pytest.raises(UserError, match="at most 0 MB"):
        images.pack(pack.parent, tmp_path / "large.tar.xz")
    (tmp_path / "broken").write_bytes(b"no archive")
    with pytest.raises(UserError, match="a file that `pack` wrote"):
        images.unpack(tmp_path / "broken", tmp_path / "there")
    with pytest.raises(UserError, match="a file that a chunk returned"):
        archive.restore(tmp_path / "broken", tmp_path / "run")
    with pytest.raises(UserError, match="unknown job 'exakt'"):
        Chunk(plan, None, tmp_path / "out", ["exakt"])
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "exact.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"no results\.json"):
        Chunk(plan, tmp_path / "state", tmp_path / "out")
    (tmp_path / "state" / "results.json").write_text('{"schema_version": 0}')
    with pytest.raises(UserError, match="version 0"):
        Chunk(plan, tmp_path / "state", tmp_path / "out")
    table = results.empty() | {"carry": ["fast"]}
    (tmp_path / "state" / "results.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"no fast\.zip"):
        Chunk(plan, tmp_path / "state", tmp_path / "out")
    monkeypatch.setattr("benchmarks.gpu.chunk.NEEDED", ("torch", "no_such_package"))
    with pytest.raises(UserError, match="no package no_such_package here"):
        Chunk(plan, None, tmp_path / "out").run(pack, 1)
