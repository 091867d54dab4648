"""Training and verification on a pretend GPU, which refuses what a GPU refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.engine.providers import providers
from export import export
from tests.export.ensembles import card_of
from tests.pretend_cuda import CUDA, CudaTensor, no_waiting, pretend_cuda
from training import load_recipe, train
from training.data.splits import to_float
from training.device import autocast_dtype
from training.method_registry import METHODS
from verification import verify

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


@pytest.mark.parametrize("preset", ["quick", pytest.param("full", marks=pytest.mark.long)])
def test_verification_ends_with_its_report(preset: str, tmp_path: Path) -> None:
    """Every attack runs; what is computed on the device reaches the report."""
    config = load_recipe("digits", SMALL)
    with pretend_cuda() as device:
        run = train(config, tmp_path / "runs" / "model", device=device)
        for seed in (7, 8):
            one = load_recipe("digits", {**SMALL, "method": "standard", "seed": seed})
            train(one, tmp_path / "surrogates" / f"s{seed}", device=device)
    model = tmp_path / "model.onnx"
    export(run, model, form="grouped", target="cpu")
    with pretend_cuda() as device:
        report = verify(
            model,
            run=run,
            preset=preset,
            images=4,
            eps=(0.1,),
            surrogates=tmp_path / "surrogates",
            device=device,
        )
    gates = {gate.name: gate.passed for gate in report.gates}
    assert gates["parity"]
    assert gates["eps-8bit"]
    assert gates["nonzero-gradient"]
    assert report.to_json()["run"]["device"] == "cuda:0"
    norms = report.to_json()["members"]["gradient_norms"]
    assert len(norms) == 3
    assert min(norms) > 0


def test_every_level_becomes_the_services_number() -> None:
    levels = np.arange(256, dtype=np.uint8)
    found = to_float(torch.from_numpy(levels))
    assert np.array_equal(found.numpy(), levels.astype(np.float32) / np.float32(255))


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
