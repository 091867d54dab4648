"""Training and verification on a pretend GPU, which refuses what a GPU refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch

from dverge_serve.engine.providers import providers
from dverge_serve.engine.report import page_path
from dverge_serve.engine.session import Engine
from export import export
from export.parity import compare, torch_scores
from tests.export.ensembles import card_of
from tests.pretend_cuda import CUDA, CudaTensor, no_waiting, pretend_cuda
from training import load_recipe, train
from training.data.splits import to_float
from training.device import autocast_dtype
from training.method_registry import METHODS
from training.models.ensemble import Ensemble
from training.runs.directory import Run
from verification import verify
from verification.attacks import presets
from verification.attacks.attack import Attack
from verification.gradients import ready

SMALL = {
    "width": 8,
    "graphs": "off",
    "batch_size": 64,
    "data.train_limit": 320,
    "data.test_limit": 24,
    **{f"{stage}.epochs": 1 for stage in ("standard", "dverge", "adversarial", "adp", "gal")},
}


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretend_cuda() as device:
        x, scalar = torch.rand(2, 3, device=device), torch.tensor(2.0)
        assert isinstance(x, CudaTensor)
        assert x.device == CUDA
        assert (x * scalar).is_cuda
        assert x.cpu().numpy().shape == (2, 3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(TypeError, match="numpy"):
            np.float32(x[0, 0])
        with pytest.raises(RuntimeError, match="meet"):
            x + torch.rand(2, 3)
        with no_waiting(), pytest.raises(RuntimeError, match="waits"):
            x.sum().item()
        network = torch.nn.Conv2d(1, 2, 1).to(device)
        network(torch.rand(1, 1, 4, 4, device=device)).sum().backward()
        assert network.weight.grad is not None
        assert network.weight.grad.is_cuda
    assert torch.rand(1).device.type == "cpu"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    """The same draws and the same arithmetic: the same weights as on the CPU."""
    config = load_recipe("digits", {**SMALL, "method": method, "precision": "fp32"})
    with pretend_cuda() as device:
        run = train(config, tmp_path / "cuda", device=device)
    assert run.checkpoint["provenance"]["device"] == "cuda:0"
    assert run.labels == tuple("0123456789")
    assert np.isfinite(run.checkpoint["holdout_accuracy"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and two surrogates from the pretend GPU, and the run's model file."""
    folder = tmp_path_factory.mktemp("pretend")
    with pretend_cuda() as device:
        run = train(load_recipe("digits", SMALL), folder / "run", device=device)
        for seed in (7, 8):
            one = load_recipe("digits", {**SMALL, "method": "standard", "seed": seed})
            train(one, folder / "surrogates" / f"s{seed}", device=device)
        export(run, folder / "model.onnx", form="grouped", target="cpu")
    return folder


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attack in two steps and two restarts, AutoAttack's own ones too."""
    whole = presets.suite

    def fewer(*positional: Any, **named: Any) -> list[Attack]:
        least = {"steps": 2, "restarts": 2, "variance_samples": 2, "queries": 10}
        return [
            replace(
                each,
                **{
                    name: min(getattr(each, name), most)
                    for name, most in least.items()
                    if hasattr(each, name)
                },
            )
            for each in whole(*positional, **named)
        ]

    class Published(pyautoattack.AutoAttack):  # type: ignore[misc]
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            for each in (self.apgd, self.apgd_targeted, self.fab):
                each.n_iter = 3
            self.square.n_queries = 10

    monkeypatch.setattr(presets, "suite", fewer)
    monkeypatch.setattr(pyautoattack, "AutoAttack", Published)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_verification_ends_with_its_report(preset: str, trained: Path, tmp_path: Path) -> None:
    """Every attack runs; what is computed on the device reaches the report."""
    model = Path(shutil.copy(trained / "model.onnx", tmp_path))
    with pretend_cuda() as device:
        report = verify(
            model,
            run=trained / "run",
            preset=preset,
            images=4,
            eps=(0.1,),
            surrogates=trained / "surrogates",
            device=device,
        )
    gates = {gate.name: gate.passed for gate in report.gates}
    assert gates["parity"]
    assert gates["eps-8bit"]
    assert gates["nonzero-gradient"]
    found = report.to_json()
    assert found["run"]["device"] == "cuda:0"
    norms = found["members"]["gradient_norms"]
    assert len(norms) == 3
    assert min(norms) > 0
    if preset == "full":
        kinds = {attack["kind"] for attack in found["attacks"]}
        assert {"noise", "gradient", "autoattack", "square"} <= kinds
        assert page_path(model).is_file()


def test_every_level_becomes_the_services_number() -> None:
    levels = np.arange(256, dtype=np.uint8)
    found = to_float(torch.from_numpy(levels))
    assert np.array_equal(found.numpy(), levels.astype(np.float32) / np.float32(255))


def test_what_tf32_would_do_is_found_by_parity(trained: Path) -> None:
    """A member that is made ready for gradients is compared without TF32, which would fail."""
    run = Run.open_finished(trained / "run")
    floats = run.probe().numpy().astype(np.float32) / np.float32(255)
    expected = Engine(trained / "model.onnx", device="cpu").run_all(floats)
    with pretend_cuda() as device:
        assert torch.backends.cudnn.allow_tf32  # by default
        members = Ensemble([ready(member, device) for member in run.members()])
        images = torch.from_numpy(floats).to(device)
        assert compare(torch_scores(members, images), expected).holds
        torch.backends.cudnn.allow_tf32 = True
        rounded = compare(torch_scores(members, images), expected)
    assert rounded.difference > 2 * rounded.tolerance
    assert not rounded.holds


def test_neither_torch_nor_onnxruntime_rounds_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32
    cudnn.allow_tf32 = products.allow_tf32 = True
    try:
        autocast_dtype("auto", CUDA)
        assert not cudnn.allow_tf32
        assert not products.allow_tf32
    finally:
        cudnn.allow_tf32, products.allow_tf32 = before
    for device in ("cuda", "tensorrt"):
        options: dict[str, Any] = dict(
            each for each in providers(device, card_of(1, 8, 8, 10, 3)) if isinstance(each, tuple)
        )
        assert options["CUDAExecutionProvider"]["use_tf32"] == 0
