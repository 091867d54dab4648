"""`dverge doctor` and `dverge cache`: what the machine has, and what the cache holds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dverge_serve.cli import run
from dverge_serve.engine import environment
from tests.cli.running import complains


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    assert run(["doctor", "--json"]) == 0
    return {each["what"]: each for each in json.loads(capsys.readouterr().out)}


def test_the_cache_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache"]) == 0
    told = capsys.readouterr()
    assert "prune" in told.out
    assert told.err == ""
    complains(capsys, ["cache", "nonsense"], "No such command 'nonsense'")


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["cores"]["found"].endswith(f"of {os.cpu_count()}")
    assert found["torch"]["found"][0].isdigit()
    assert run(["doctor"]) == 0
    assert "GPU" in capsys.readouterr().out


def test_doctor_says_what_will_be_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags : fpu avx2\nflags : fpu\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    monkeypatch.setattr(environment, "cores", lambda: 1)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.setattr(environment, "LITTLE_DISK", 2**62)
    found = findings(capsys)
    assert found["instructions"]["found"] == "avx2"
    assert "fp32" in found["instructions"]["advice"]
    assert "one core" in found["cores"]["advice"]
    assert "hours" in found["GPU"]["advice"]
    assert "dverge cache prune" in found["disk"]["advice"]


def test_doctor_names_the_library_that_cuda_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str) -> None:
        if path.endswith("cuda.so"):
            raise OSError("libcurand.so.10: cannot open shared object file")

    monkeypatch.setattr(environment, "gpus", lambda: 1)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: print("Failed to load"))
    monkeypatch.setattr("ctypes.CDLL", load)
    found = findings(capsys)
    assert "libcurand.so.10" in found["ONNX Runtime's CUDA"]["found"]
    assert "dverge-serve[gpu]" in found["ONNX Runtime's CUDA"]["advice"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an old and a new entry in each of two parts."""
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path / "cache"))
    old = time.time() - 40 * 86_400
    for age in ("old", "new"):
        file = tmp_path / "cache" / "attacks" / f"{age}.npz"
        inside = tmp_path / "cache" / "surrogates" / age / "members.safetensors"
        for each in (file, inside):
            each.parent.mkdir(parents=True, exist_ok=True)
            each.write_bytes(b"x" * 1000)
        if age == "old":
            for each in (file, inside, inside.parent):
                os.utime(each, (old, old))
    return tmp_path / "cache"


def test_the_cache_is_listed_by_its_parts(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(cache)
    assert [(each["name"], each["entries"], each["size"]) for each in told["parts"]] == [
        ("attacks", 2, 2000),
        ("surrogates", 2, 2000),
    ]
    assert run(["cache", "list"]) == 0
    assert "surrogates" in capsys.readouterr().out


def test_pruning_deletes_what_is_old(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "prune", "attacks"]) == 0
    assert capsys.readouterr().out.startswith("deleted 1 entry,")
    assert {each.name for each in cache.rglob("*")} >= {"new.npz", "old"}
    assert run(["cache", "prune"]) == 0
    assert [each.name for each in (cache / "surrogates").iterdir()] == ["new"]
    assert run(["cache", "prune", "--days", "0"]) == 0
    assert not [each for each in cache.rglob("*") if each.is_file()]


def test_an_unknown_part_is_refused_with_the_known_ones(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complains(capsys, ["cache", "prune", "attack"], "expected attacks or surrogates")
