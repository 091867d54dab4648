"""The GPU in the engine: counted by the driver, refused or replaced in one line, never in silence.

No test needs a GPU: a pretend driver counts one, and ONNX Runtime cannot use it.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from packaging.requirements import Requirement

from dverge_serve import cli
from dverge_serve.engine import providers as devices
from dverge_serve.engine import session as sessions
from dverge_serve.engine.model_file import check_placement
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.serving import logs
from tests.serving import tiny

NO_GPU = devices.gpus() == 0


class Driver:
    """The two functions of `libcuda.so.1`, with their return codes and the count."""

    def __init__(self, count: int, initialised: int = 0, counted: int = 0) -> None:
        self.count, self.initialised, self.counted = count, initialised, counted

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.initialised

    def cuDeviceGetCount(self, place: Any) -> int:  # noqa: N802
        place._obj.value = self.count
        return self.counted


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with its driver, beside an ONNX Runtime that cannot use it."""
    if not NO_GPU or devices.CUDA not in ort.get_available_providers():
        pytest.skip("needs a CUDA build of ONNX Runtime and no GPU")
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    missing = "Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file"
    monkeypatch.setattr(ort, "preload_dlls", lambda: print(missing))


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(3), 3),
        (Driver(0), 0),
        (Driver(2, initialised=100), 0),  # CUDA_ERROR_NO_DEVICE: CUDA_VISIBLE_DEVICES=-1, say
        (Driver(2, counted=3), 0),
    ],
)
def test_the_driver_counts_the_gpus(
    driver: Driver, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # of which the driver found some
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert devices.gpus() == expected


@pytest.mark.parametrize("there", [True, False])
def test_without_the_drivers_library_its_file_tells(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / ("nvidiactl" if there else "none"))
    assert devices.gpus() == there


@pytest.mark.usefixtures("unusable_gpu")
def test_auto_says_once_why_it_is_the_cpu(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(RuntimeWarning) as told:
        engine = Engine(tiny_model, threads=2)
    assert engine.provider == devices.CPU
    assert engine._lanes is not None
    (line,) = (str(each.message) for each in told)
    assert line.startswith(
        "ONNX Runtime cannot use cuda, it fell back to CPUExecutionProvider (lib"
    )
    assert ".so" in line  # the first library that is missing
    assert line.endswith(": the CPU is used")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("unusable_gpu")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_that_was_named_is_refused_in_one_line(
    device: devices.Device, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"{device}.* \(lib.*\.so.*use `device` cpu"):
        Engine(tiny_model, device=device)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("unusable_gpu")
def test_commands_say_one_line_and_json_stays_json(
    tiny_model: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", str(tiny_model), "--json", "--batches", "1", "--seconds", "0.01"]
    with pytest.warns(RuntimeWarning, match="the CPU is used"):
        assert cli.run(arguments) == 0
    assert json.loads(capfd.readouterr().out)["provider"] == devices.CPU
    assert cli.run([*arguments, "--device", "cuda"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "use --device cpu" in line
    # `export` that measures: without a named device the work goes on.
    measured = ["--form", "measure"]
    assert cli.run(["export", "any.onnx", "--run", str(tiny_run), *measured]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("wrote any.onnx")
    (line,) = said.err.splitlines()
    assert line.startswith("ONNX Runtime cannot use cuda")
    assert line.endswith(": the file is made for the CPU")
    # It has no --device; it measures for its --target.
    assert (
        cli.run(["export", "other.onnx", "--run", str(tiny_run), *measured, "--target", "cuda"])
        == 2
    )
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "name a form: --form grouped|branches" in line
    assert "--device" not in line
    assert not Path("other.onnx").exists()


def test_a_warning_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(_: list[str]) -> int:
        warnings.showwarning("no libcurand: the CPU is used", RuntimeWarning, __file__, 1)
        return 0

    monkeypatch.setattr(cli, "run", warn)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr() == ("", "dverge: no libcurand: the CPU is used\n")


def test_a_worker_logs_a_warning_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logs.LOGGER, "handlers", [])
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    logs.set_up("json")
    warnings.showwarning("no libcurand: the CPU is used", RuntimeWarning, __file__, 1)
    said = json.loads(capsys.readouterr().out)
    assert (said["level"], said["message"]) == ("warning", "no libcurand: the CPU is used")


def test_every_library_that_onnxruntime_needs_is_pinned() -> None:
    """torch alone no longer brings them all: cuRAND was missing."""
    wanted = [
        Requirement(line)
        for line in metadata.requires("onnxruntime-gpu") or []
        if "extra" in line and ("cuda" in line or "cudnn" in line)
    ]
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in pinned)
    assert {each.name for each in wanted} >= {"nvidia-curand", "nvidia-cudnn-cu13"}
    for each in wanted:
        assert versions[each.name] in each.specifier, each


def test_int8_never_goes_to_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: object) -> None:
        raise AssertionError("a session on the GPU was made")

    monkeypatch.setattr(devices, "gpus", lambda: 1)
    monkeypatch.setattr(sessions, "gpu_session", tried)
    model = tmp_path / "model.onnx"
    weights = np.zeros((1, 2, 1, tiny.SIDE, tiny.SIDE), np.float32)
    tiny.save_linear_model(
        model, weights, np.zeros((1, 2), np.float32), ("a", "b"), precision="int8"
    )
    assert Engine(model).provider == devices.CPU
    with pytest.raises(UserError, match="CUDA was asked for but the model is int8"):
        Engine(model, device="cuda")


def placed(first: str, nodes: dict[str, list[str]]) -> Any:
    """Return what `check_placement` asks of a session: its providers, and where its nodes are."""

    def part(name: str, types: list[str]) -> SimpleNamespace:
        found = [SimpleNamespace(op_type=each) for each in types]
        return SimpleNamespace(ep_name=name, get_nodes=lambda: found)

    return SimpleNamespace(
        get_providers=lambda: [first, devices.CPU],
        get_provider_graph_assignment_info=lambda: [part(*each) for each in nodes.items()],
    )


def test_work_beside_the_gpu_is_refused_and_arithmetic_of_shapes_is_not() -> None:
    cuda = {devices.CUDA: ["Conv", "Gemm", "MatMul"]}
    check_placement("cuda", placed(devices.CUDA, cuda), [])
    shapes = ["Shape", "Gather", "Concat", "Slice"]
    check_placement("cuda", placed(devices.CUDA, cuda | {devices.CPU: shapes}), [])
    for kind in ("QLinearConv", "FusedMatMul", "Gemm"):
        with pytest.raises(UserError, match=f"no kernel for the model's {kind}"):
            check_placement("cuda", placed(devices.CUDA, cuda | {devices.CPU: [kind, "Shape"]}), [])
    with pytest.raises(UserError, match=r"fell back to CPUExecutionProvider .libcurand"):
        check_placement("cuda", placed(devices.CPU, {}), ["libcurand.so.10: not found"])
    with pytest.raises(UserError, match="fell back to CUDAExecutionProvider;"):
        check_placement("tensorrt", placed(devices.CUDA, cuda), [])


def test_onnxruntime_tells_where_the_nodes_of_our_files_are(tiny_model: Path) -> None:
    """What the check reads is there: on the CPU every convolution is counted."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(tiny_model), options, providers=[devices.CPU])
    (part, *_) = session.get_provider_graph_assignment_info()
    assert part.ep_name == devices.CPU
    session.get_providers = lambda: [devices.CUDA]
    with pytest.raises(UserError, match=r"no kernel for the model's .*Conv"):
        check_placement("cuda", session, [])


def test_a_call_that_fails_does_not_go_on_elsewhere(tiny_model: Path) -> None:
    """ONNX Runtime would make the session again, on the CPU, and print so on standard output."""
    with Engine(tiny_model, device="cpu", threads=1) as engine:
        assert engine.session._enable_fallback is False


def test_tensorrt_gets_one_profile_for_every_batch(tiny_model: Path) -> None:
    card = Engine(tiny_model, device="cpu", threads=1).card
    (name, options), *rest = devices.providers("tensorrt", card, 1)
    assert name == devices.TENSORRT
    assert options["trt_profile_min_shapes"] == "images:1x1x8x8"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"]
    assert options["trt_profile_max_shapes"] == "images:64x1x8x8"
    assert not any("cache" in key for key in options)  # its names do not tell weights apart
    assert [each[0] for each in rest[:-1]] == [devices.CUDA]
    assert rest[-1] == devices.CPU
