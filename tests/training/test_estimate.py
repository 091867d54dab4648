"""What a run will cost: what is timed, what is counted, what is told before it is begun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from tests.training.tape import Tape
from training import estimate as estimating
from training.budget import gradient_evaluations
from training.config import Config
from training.estimate import estimate, fit_to_time
from training.methods import TrainingStage, stages
from training.methods.dverge_draws import draw_layer
from training.methods.stored_images import StoredImages
from training.models.member import Member
from training.parallel import cuda_graphs
from training.parallel.topology import Batch
from training.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "each"),
    [
        ("dverge", 3 + 2),
        ("dverge+adversarial", 3 + 2 + 10 + 1),
        ("adversarial", 10 + 1),
        ("transfer", 2),
        ("dverge+transfer", 3 + 2 + 2),
        ("adp", 1),
        ("gal", 2),
    ],
)
def test_gradient_evaluations_of_each_method(method: str, each: int) -> None:
    config = tiny_config(method=method, members=3, standard__epochs=5)
    second = method if method in ("adp", "gal", "adversarial", "transfer") else "dverge"
    epochs = getattr(config, second).epochs
    assert gradient_evaluations(config, 100) == {
        "standard": 5 * 100 * 3,
        second: epochs * each * 100 * 3,
    }


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_dverge_is_timed_at_layers_spread_over_the_depth(
    every: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each part of the depth; the first is done twice, because the first time warms up."""
    config = tiny_config(dverge__layer_every=every)
    drawn: list[int] = []

    def watched(
        chosen: Config, members: list[Member], optimizers: list[SGD], **_: object
    ) -> list[TrainingStage]:
        def step(epoch: int, number: int, batch: Batch) -> Tensor:
            when = (epoch,) if every == "epoch" else (epoch, number)
            drawn.append(draw_layer(chosen, 8, *when))
            return torch.zeros(2)

        found = stages(chosen, members, optimizers)
        return [replace(found[1], step=step)]

    monkeypatch.setattr(estimating, "stages", watched)
    estimate(config, CPU)
    warm_up, *timed = drawn
    assert warm_up == timed[0]
    assert [(layer - 1) * len(timed) // 8 for layer in timed] == list(range(estimating.TIMED_STEPS))


def test_seconds_are_those_of_a_step_times_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one second for every step, and by nine while one warms up."""
    config = tiny_config(standard__epochs=7, dverge__epochs=11)
    now = [0.0]

    def watched(
        chosen: Config, members: list[Member], optimizers: list[SGD], **_: object
    ) -> list[TrainingStage]:
        seen = set()

        def counted(stage: TrainingStage) -> TrainingStage:
            def step(epoch: int, number: int, batch: Batch) -> Tensor:
                now[0] += 1 if stage.name in seen else 9
                seen.add(stage.name)
                return torch.zeros(2)

            return replace(stage, step=step)

        return [counted(stage) for stage in stages(chosen, members, optimizers)]

    monkeypatch.setattr(estimating, "stages", watched)
    monkeypatch.setattr("training.estimate.time.monotonic", lambda: now[0])
    # 90 images make 6 batches of 16.
    assert estimate(config, CPU)["seconds"] == {"standard": 7 * 6, "dverge": 11 * 6}


def test_where_steps_are_recorded_replays_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every layer the warm-ups and the recording come before the clock is read."""
    tape, looks = Tape(), list[int]()

    def look() -> float:
        looks.append(len(tape.asked))
        return float(len(looks))

    monkeypatch.setattr(cuda_graphs, "wanted", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda *_: tape)
    monkeypatch.setattr("training.estimate.time.monotonic", look)
    estimate(tiny_config(dverge__steps=1), CPU)
    timed = [tape.asked[begun:end] for begun, end in zip(looks[::2], looks[1::2], strict=True)]
    assert len(timed) == 2 * estimating.TIMED_STEPS
    assert all(set(asked) == {"replay"} for asked in timed)


def test_everything_is_counted_of_the_runs_own_images_and_members() -> None:
    found = estimate(tiny_config(), CPU)
    assert found["training_images"] == 90
    assert found["gradient_evaluations"] == {"standard": 2 * 90 * 2, "dverge": 2 * 90 * 2 * 4}
    assert found["seconds"].keys() == found["gradient_evaluations"].keys()
    assert any(line.startswith("90 training images of 10 classes") for line in found["notes"])


def test_what_starting_weights_stand_for_costs_nothing(tmp_path: Path) -> None:
    run = train(tiny_config(), tmp_path / "run", device=CPU)
    assert estimate(tiny_config(), CPU)["parameters"] == run.checkpoint["parameters"]
    found = estimate(tiny_config(start=str(run.path / "standard.safetensors")), CPU)
    assert found["gradient_evaluations"].keys() == found["seconds"].keys() == {"dverge"}
    assert any("standard training, which is skipped" in line for line in found["notes"])


def test_the_cost_of_stored_images_is_told(finished: Path) -> None:
    settings = {"transfer__copies": 3, "transfer__steps": 7, "transfer__sources": str(finished)}
    note = estimate(tiny_config(method="transfer", **settings), CPU)["notes"][-1]
    assert note == (
        "3 adversarial copies of 90 images from each of 2 sources: "
        "3,780 gradient evaluations, 0.0 GB in the run directory until it is finished"
    )
    trained = tiny_config(method="dverge+transfer", transfer__networks=2)
    assert "2 sources, which are trained first:" in estimate(trained, CPU)["notes"][-1]


def seconds_by_steps(monkeypatch: pytest.MonkeyPatch, standard: float, dverge: float) -> None:
    """Let the clock show so many seconds for a step of each stage."""
    now = [0.0]

    def watched(
        chosen: Config, members: list[Member], optimizers: list[SGD], stored: StoredImages | None
    ) -> list[TrainingStage]:
        def timed(stage: TrainingStage, each: float) -> TrainingStage:
            def step(epoch: int, number: int, batch: Batch) -> Tensor:
                now[0] += each
                return torch.zeros(2)

            return replace(stage, step=step)

        found = stages(chosen, members, optimizers, stored=stored)
        return [timed(found[0], standard), timed(found[1], dverge)]

    monkeypatch.setattr(estimating, "stages", watched)
    monkeypatch.setattr("training.estimate.time.monotonic", lambda: now[0])


def test_a_time_gives_both_stages_epochs_in_the_same_proportion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """90 images make 6 batches: 20 epochs of 6 s, 40 of 24 s, and a tenth for all else."""
    seconds_by_steps(monkeypatch, 1, 4)
    config = tiny_config(standard__epochs=20, dverge__epochs=40)
    fitted, cost = fit_to_time(config, 610, CPU)
    assert cost["epochs"] == {"standard": 10, "dverge": 20}
    assert (fitted.standard.epochs, fitted.dverge.epochs) == (10, 20)
    assert cost["seconds"] == {"standard": 60, "dverge": 480}
    assert cost["gradient_evaluations"] == gradient_evaluations(fitted, 90)
    assert fitted == config.overridden({"standard.epochs": 10, "dverge.epochs": 20})


def test_a_long_time_gives_the_recipes_epochs_and_a_short_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds_by_steps(monkeypatch, 1, 4)
    config = tiny_config(standard__epochs=20, dverge__epochs=40)
    assert fit_to_time(config, 1e6, CPU)[0] == config
    with pytest.raises(UserError, match=r"`budget` 59s, less than an epoch .* 1m 01s or more"):
        fit_to_time(config, 59, CPU)
    assert fit_to_time(config, 61, CPU)[1]["epochs"] == {"standard": 1, "dverge": 2}
