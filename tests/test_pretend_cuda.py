"""Training and verification on a pretend GPU, which refuses what a GPU refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from PIL import Image
from torch import Tensor

from dverge_serve.engine.providers import providers
from dverge_serve.engine.report import page_path
from dverge_serve.engine.session import Engine
from export import export
from export.parity import compare, torch_scores
from tests.export.ensembles import card_of
from tests.pretend_cuda import CUDA, CudaTensor, no_waiting, pretend_cuda
from tests.training.tape import Tape
from training import load_recipe, train
from training.config import Data
from training.data.splits import Split, batches, load_training, to_float
from training.data.streaming import Streamed
from training.device import autocast_dtype
from training.method_registry import METHODS
from training.methods import epoch_batches, stages
from training.models.ensemble import Ensemble
from training.parallel import cuda_graphs
from training.parallel.cuda_graphs import WARM_UPS
from training.runs.directory import Run
from training.seeds import generator
from training.trainer import prepare
from verification import verify
from verification.attacks import presets
from verification.attacks.attack import Attack
from verification.attacks.transforms import diverse_inputs
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
        with no_waiting(), pytest.raises(RuntimeError, match="waits"):
            x[x > 0.5]
        with no_waiting(), pytest.raises(RuntimeError, match="waits"):
            torch.rand(3).to(device)
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


def test_batches_are_the_cpus_and_nothing_waits_for_them() -> None:
    """Order, crops and flips are drawn where every machine draws the same."""
    draw = torch.Generator().manual_seed(0)
    split = Split(
        torch.randint(0, 256, (20, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(20)
    )
    data = Data(mode="L", crop=(8, 8), pad=2, flip=True)
    expected = list(batches(split, 8, data, 0, "t"))
    with pretend_cuda() as device:
        there = split.to(device)
        with no_waiting():
            found = list(batches(there, 8, data, 0, "t"))
        assert all(images.is_cuda and labels.is_cuda for images, labels in found)
    for (images, labels), (wanted, classes) in zip(found, expected, strict=True):
        assert torch.equal(images.cpu(), wanted)
        assert torch.equal(labels.cpu(), classes)


def test_streamed_images_are_sent_without_waiting(tmp_path: Path) -> None:
    for part, name, index in product(("train", "test"), "ab", range(3)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * index).save(folder / f"{index}.png")
    data = Data(
        name="imagefolder", path=str(tmp_path), mode="L", crop=(8, 8), memory_gb=0, workers=0
    )
    split = load_training(data).train
    assert isinstance(split, Streamed)
    with pretend_cuda() as device, no_waiting():
        found = list(split.to(device).fetch([torch.tensor([0, 1])]))
        assert [(images.is_cuda, labels.is_cuda) for images, labels in found] == [(True, True)]


def test_diverse_inputs_do_not_wait() -> None:
    """What the host must know of a draw is drawn by the host."""
    seen: list[tuple[int, ...]] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.sum((1, 2, 3))

    with pretend_cuda() as device, no_waiting():
        draw = generator("t", device=device)
        diverse = diverse_inputs(loss, draw, probability=1.0)
        diverse(torch.rand(2, 1, 8, 8, device=device))
    assert seen == [(2, 1, 8, 8)]


@pytest.mark.parametrize(
    ("method", "batchnorm"),
    # Stored images wait on the disk; tests of the method itself train with them.
    [
        *((name, "running") for name, each in METHODS.items() if not each.sources),
        ("dverge", "batch"),
    ],
)
def test_no_step_waits_for_the_device(
    method: str, batchnorm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warmed up, recorded and replayed where it is recorded: DVERGE and standard training."""
    tape = Tape()
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda *_: tape)
    small = {"batch_size": 8, "data.train_limit": 40, "members": 2, "graphs": "auto"}
    small |= {"dverge.steps": 1, "adversarial.steps": 1, "dverge.batchnorm": batchnorm}
    config = load_recipe("digits", {**SMALL, **small, "method": method, "precision": "fp32"})
    data = load_training(config.data)
    with pretend_cuda() as device:
        members, optimizers = prepare(config, data, device)
        stage = stages(config, members, optimizers)[-1]
        batch = next(epoch_batches(data.train.to(device), config, stage, 0))
        with no_waiting():
            for _ in range(WARM_UPS + 2):
                stage.step(0, 0, batch)
    assert ("replay" in tape.asked) == (method in ("standard", "dverge"))


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
