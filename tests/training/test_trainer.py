"""Training as a whole: layers drawn, batches paired, learning rates, losses that are no numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training import loss_meter
from training.accuracy import accuracy
from training.config import MAX_SEED, Data
from training.data.splits import Split, load_training, normalisation
from training.device import pick_device
from training.method_registry import METHODS
from training.methods import Step, TrainingStage, dverge, epoch_batches, standard
from training.methods.dverge_draws import draw_layer
from training.parallel.topology import Batch, ProcessTopology
from training.runs.directory import Run
from training.schedules import Dverge
from training.trainer import train

CPU = torch.device("cpu")
PAIRS = TrainingStage(METHODS["dverge"], Dverge(), lambda *_: torch.zeros(2))


class Steps:
    """Stands in for the training steps and notes what they are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.standard: list[dict[str, Any]] = []
        self.dverge: list[dict[str, Any]] = []

        def make_step(config: Any, members: Any, optimizers: Any, topology: Any) -> Step:
            def standard_step(epoch: int, number: int, batch: Batch) -> Tensor:
                rate = optimizers[0].param_groups[0]["lr"]
                self.standard.append({"source": batch[0], "lr": rate})
                return torch.ones(len(members))

            return standard_step

        def step(
            members: Any,
            optimizers: Any,
            source: Tensor,
            labels: Tensor,
            target: Tensor,
            **more: Any,
        ) -> Tensor:
            group = optimizers[0].param_groups[0]
            self.dverge.append({"source": source, "target": target, **group, **more})
            return torch.ones(len(members))

        monkeypatch.setattr(standard, "make_step", make_step)
        monkeypatch.setattr(dverge, "step", step)
        monkeypatch.setattr("training.methods.overlap.overlaps", lambda *_: False)


def test_seeds_that_are_kept_for_surrogates_train_nothing_else(tmp_path: Path) -> None:
    config = tiny_config(seed=MAX_SEED + 1)
    with pytest.raises(UserError, match="seed 4294967296; expected 0 to 4294967295; larger ones"):
        train(config, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", device=CPU, surrogate=True).finished


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_a_layer_is_drawn_anew_each_epoch_or_each_batch(
    every: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    config = tiny_config(dverge__epochs=40, dverge__layer_every=every)
    train(config, tmp_path / "run", device=CPU)
    count = 6  # batches of 16 out of 90 images
    assert len(steps.dverge) == 40 * count
    epochs = [
        [step["layer"] for step in steps.dverge[start : start + count]]
        for start in range(0, len(steps.dverge), count)
    ]
    assert {layer for layers in epochs for layer in layers} == set(range(1, 9))
    changing = sum(len(set(layers)) > 1 for layers in epochs)
    assert changing == 0 if every == "epoch" else changing > 30


def test_layers_are_uniform_over_all_of_them_and_follow_the_seed() -> None:
    config = tiny_config()
    drawn = [draw_layer(config, 20, epoch) for epoch in range(4000)]
    counts = Counter(drawn)
    assert set(counts) == set(range(1, 21))
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260
    assert drawn == [draw_layer(config, 20, epoch) for epoch in range(4000)]
    other = replace(config, seed=1)
    assert drawn[:50] != [draw_layer(other, 20, epoch) for epoch in range(50)]


def test_stages_get_their_own_optimiser_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    config = tiny_config(
        standard__lr=0.4,
        standard__epochs=4,
        dverge__lr=0.02,
        dverge__momentum=0.5,
        dverge__weight_decay=0.01,
        dverge__epochs=2,
    )
    train(config, tmp_path / "run", device=CPU)
    rates = [step["lr"] for step in steps.standard]
    assert rates == pytest.approx([0.4] * 12 + [0.04] * 6 + [0.004] * 6)
    first = steps.dverge[0]
    assert (first["lr"], first["momentum"], first["weight_decay"]) == (0.02, 0.5, 0.01)
    assert first["settings"] is config.dverge


def test_the_diversity_of_every_pair_is_logged_as_training_goes(tmp_path: Path) -> None:
    config = tiny_config(members=3, standard__epochs=1, dverge__epochs=12)
    run = train(config, tmp_path / "run", device=CPU)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    matrices = [line["diversity"] for line in lines if "diversity" in line]
    assert len(matrices) == 1 + 10
    for matrix in matrices:
        for i in range(3):
            assert matrix[i][i] is None
            for j in range(3):
                assert i == j or matrix[i][j] == matrix[j][i] > 0


def test_sources_and_targets_are_shuffled_independently() -> None:
    split = Split(
        torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 1, 8, 8).contiguous(),
        torch.arange(40),
    )
    config = tiny_config(data__pad=0)
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(50):
        sources, targets = [], []
        for source, labels, target in epoch_batches(split, config, PAIRS, epoch):
            assert torch.equal((source[:, 0, 0, 0] * 255).round().long(), labels)
            assert target.shape == source.shape
            sources += labels.tolist()
            targets += (target[:, 0, 0, 0] * 255).round().long().tolist()
        assert sorted(sources) == sorted(targets) == list(range(40))
        pairs.update(zip(sources, targets, strict=True))
    assert len(pairs) > 900  # of 1,600; the same order every time would give 40
    same = sum(count for (source, target), count in pairs.items() if source == target)
    assert same < 120  # one in forty by chance, 50 of 2,000


def test_training_learns(tmp_path: Path) -> None:
    config = tiny_config(
        width=8,
        data__train_limit=400,
        standard__epochs=12,
        dverge__epochs=6,
        standard__schedule="one-cycle",
        dverge__schedule="one-cycle",
    )
    run = train(config, tmp_path / "run", device=CPU)
    data = load_training(config.data)
    assert accuracy(run.members("standard"), data.holdout) > 0.7
    assert accuracy(run.members(), data.holdout) > 0.6
    assert not torch.equal(
        run.members()[0].state_dict()["stages.0.conv.weight"],
        run.members("standard")[0].state_dict()["stages.0.conv.weight"],
    )


def test_the_published_recipe_trains(tmp_path: Path) -> None:
    """Distillation with BatchNorm in training mode, ten steps, step schedule."""
    config = tiny_config(
        dverge__batchnorm="batch", dverge__steps=10, dverge__eps=0.07, dverge__step_size=0.007
    )
    run = train(config, tmp_path / "run", device=CPU)
    for member in run.members():
        assert all(bool(t.isfinite().all()) for t in member.state_dict().values())
        counted = int(member.state_dict()["stages.0.norm.num_batches_tracked"])
        steps = 6 * 2
        assert counted == steps + steps * (10 * 2 + 1)  # clean; then distilling and learning


def test_a_standard_ensemble_has_one_stage(tmp_path: Path) -> None:
    run = train(tiny_config(method="standard", members=1), tmp_path / "run", device=CPU)
    assert (run.path / "members.safetensors").read_bytes() == (
        run.path / "standard.safetensors"
    ).read_bytes()
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_names_the_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    Steps(monkeypatch)
    monkeypatch.setattr(dverge, "step", lambda *_, **__: torch.tensor([1.0, bad]))
    with pytest.raises(UserError, match=r"loss of member 1 became .* in dverge epoch 1") as caught:
        train(tiny_config(), tmp_path / "run", device=CPU)
    assert caught.value.exit_code == 2
    assert "dverge.lr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Run(tmp_path / "run").finished
    assert not (tmp_path / "run" / "members.safetensors").exists()


def test_losses_are_read_now_and_then_and_the_window_of_a_nan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of 6 steps, windows of 4: two looks an epoch, and step 3 of the last is no number."""
    steps = Steps(monkeypatch)
    monkeypatch.setattr(loss_meter, "WINDOW", 4)
    plain, looks = ProcessTopology.losses, 0

    def counted(topology: ProcessTopology, own: Tensor, members: int) -> Tensor:
        nonlocal looks
        looks += 1
        return plain(topology, own, members)

    monkeypatch.setattr(ProcessTopology, "losses", counted)

    def step(*_: Any, **more: Any) -> Tensor:
        steps.dverge.append(more)
        return torch.tensor([1.0, float("nan") if len(steps.dverge) == 15 else 3.0])

    monkeypatch.setattr(dverge, "step", step)
    config = tiny_config(dverge__epochs=5)
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", device=CPU)
    said = (
        "the loss of member 1 became nan in dverge epoch 3, steps 1 to 4; expected finite numbers"
    )
    assert str(caught.value).startswith(said)
    assert len(steps.dverge) == 16  # the rest of the window, and no more
    assert looks == 2 * (config.standard.epochs + 2) + 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["losses"] for line in lines[-2:]] == [[1.0, 3.0]] * 2


def test_weights_that_are_no_numbers_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of an epoch's last step is finite; what the step made of the weights is not."""
    monkeypatch.setattr("training.trainer.SAVE_EVERY_S", 0.0)
    plain, taken = dverge.step, 0

    def step(members: Any, *args: Any, **more: Any) -> Tensor:
        nonlocal taken
        taken += 1
        found = plain(members, *args, **more)
        if taken == 12:
            with torch.no_grad():
                next(members[1].parameters()).view(-1)[0] = float("inf")
        return found

    monkeypatch.setattr(dverge, "step", step)
    monkeypatch.setattr("training.methods.overlap.overlaps", lambda *_: False)
    with pytest.raises(
        UserError, match=r"weights of member 1 became .* in dverge epoch 2, step 6;"
    ):
        train(tiny_config(dverge__epochs=4), tmp_path / "run", device=CPU)
    state = Run(tmp_path / "run").load_state()
    assert state is not None
    stage, epoch, tensors = state
    assert (stage, epoch) == (1, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_learning_rate_out_of_all_reason_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss of member 0 became"):
        train(tiny_config(standard__lr=1e30), tmp_path / "run", device=CPU)


def test_measured_normalisation_is_the_training_images_mean_and_deviation() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=draw, dtype=torch.uint8)
    pixels[:, 2] = 7  # a channel that never changes
    split = Split(pixels, torch.zeros(50, dtype=torch.int64))
    mean, std = normalisation(tiny_config().data, split)
    exact = pixels.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(exact.mean(1).tolist(), abs=5.1e-5)
    assert std[:2] == pytest.approx(exact.std(1, unbiased=False).tolist()[:2], abs=5.1e-5)
    assert std[2] == round(1 / 255, 4)  # no division by zero
    given = Data(mode="L", mean=(0.1,), std=(0.2,))
    assert normalisation(given, split) == ([0.1], [0.2])


def test_accuracy_is_of_the_mean_logits_over_every_batch() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, images: Tensor) -> Tensor:
            right = torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 3)
            return right * self.weight

    images = torch.arange(3, dtype=torch.uint8).repeat(400).view(-1, 1, 1, 1)
    labels = torch.arange(3).repeat(400)
    labels[:300] = (labels[:300] + 1) % 3
    split = Split(images, labels)
    members: Any = [Fixed(3.0), Fixed(-1.0)]
    assert accuracy(members, split) == 900 / 1200
    members = [Fixed(1.0), Fixed(-3.0)]
    assert accuracy(members, split) < 0.5


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    available = torch.cuda.is_available()
    assert pick_device("auto").type == ("cuda" if available else "cpu")
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        pick_device("tpu")


def test_a_gpu_asked_for_where_there_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU") as caught:
        pick_device("cuda")
    assert caught.value.exit_code == 2
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_training_on_a_gpu_ends_and_resumes(tmp_path: Path) -> None:
    device = torch.device("cuda")
    run = train(tiny_config(), tmp_path / "run", device=device)
    assert run.checkpoint["provenance"]["device"] == "cuda:0"
    assert all(not tensor.is_cuda for m in run.members() for tensor in m.state_dict().values())
    assert train(tiny_config(), tmp_path / "run", device=device, resume=True).finished
