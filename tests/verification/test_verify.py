"""Verification: the whole of it on a tiny model, each gate, and the pieces against closed forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.engine import Engine
from dverge_serve.errors import UserError
from dverge_serve.report import read_report, report_path
from dverge_serve.scores import Scores
from export.parity import Parity
from training.config import load_recipe
from training.data import Split, load_training
from training.run import Run
from verification import gates
from verification.statistics import rate
from verification.suite import Attack, Outcomes, Target, deliver, quick_suite, run_suite
from verification.surrogates import surrogate_config, surrogates
from verification.verify import Evaluation, calibrate, find_run, verify

EPS = (0.03, 0.3)


@pytest.fixture(scope="module")
def evaluated(
    tiny_model: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    model = tmp_path_factory.mktemp("verify") / "model.onnx"
    shutil.copy(tiny_model, model)
    return model, verify(Evaluation(model=model, run=tiny_run, eps=EPS))


def test_the_report_is_about_these_bytes(evaluated: tuple[Path, dict[str, Any]]) -> None:
    model, report = evaluated
    engine = Engine(model, device="cpu")
    assert json.loads(report_path(model).read_bytes()) == report
    assert read_report(model, engine.sha256) == report
    assert read_report(model, "0" * 64) is None


def test_the_figures_follow_from_the_outcome_matrix(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, report = evaluated
    matrix = report["outcomes"]["model"]
    clean = np.array([c == "1" for c in matrix["clean"]])
    assert report["clean_accuracy"]["value"] == clean.mean()
    threats = {attack["name"]: attack["threat"] for attack in report["attacks"]}
    for row in report["robust_accuracy"]:
        for threat in ("transfer", "white_box", "all"):
            robust = clean.copy()
            for entry in matrix["survived"]:
                if entry["eps"] == row["eps"] and threat in ("all", threats[entry["attack"]]):
                    robust &= np.array([c == "1" for c in entry["images"]])
            assert row[threat]["value"] == robust.mean()
        assert row["all"]["value"] <= min(row["transfer"]["value"], row["white_box"]["value"])
        assert row["transfer"]["value"] <= min(
            row["transfer"]["float"], row["transfer"]["delivered"]
        )


def test_attacks_bite_and_more_eps_bites_more(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, report = evaluated
    small, large = report["robust_accuracy"]
    assert large["all"]["value"] < small["all"]["value"] < report["clean_accuracy"]["value"]


def test_same_seed_same_report(evaluated: tuple[Path, dict[str, Any]], tiny_run: Path) -> None:
    model, first = evaluated
    again = verify(Evaluation(model=model, run=tiny_run, eps=EPS))
    del again["run"]
    assert again == {key: value for key, value in first.items() if key != "run"}


def test_without_the_run_the_white_box_is_not_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_model, "model.onnx")
    report = verify(Evaluation(model=Path("model.onnx"), eps=(0.1,), images=32))
    assert report["verdict"] == "INCONCLUSIVE"
    assert report["robust_accuracy"][0]["white_box"] is None
    assert report["control"] is None
    assert report["clean_accuracy"]["n"] == 32


def test_the_matching_run_under_runs_is_found(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Engine(tiny_model, device="cpu").card
    monkeypatch.chdir(tmp_path)
    assert find_run(card, None) is None
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    found = find_run(card, None)
    assert found is not None
    assert found.path == Path("runs/mine")
    odd = Run.open_finished(tiny_run).checkpoint | {"members_sha256": "0" * 64}
    (tmp_path / "runs" / "mine" / "checkpoint.json").write_text(json.dumps(odd))
    assert find_run(card, None) is None
    with pytest.raises(UserError, match="the run this model was exported from"):
        find_run(card, Path("runs/mine"))


def test_surrogates_are_strangers_trained_like_the_model_and_cached(cache: Path) -> None:
    config = load_recipe(
        "digits", {"width": 2, "standard.epochs": 1, "data.train_limit": 64, "seed": 7}
    )
    wanted = surrogate_config(config, 3)
    assert wanted.seed > 2**32 - 1
    assert wanted.standard == config.standard
    assert wanted.architecture == config.architecture
    data = load_training(config.data)
    (first,) = surrogates(config, data, torch.device("cpu"), sizes=(3,))
    stamp = (first.run.path / "members.safetensors").stat().st_mtime_ns
    (second,) = surrogates(config, data, torch.device("cpu"), sizes=(3,))
    assert (second.run.path / "members.safetensors").stat().st_mtime_ns == stamp
    other = Split(data.train.images, data.train.labels.flip(0))
    data = type(data)(data.labels, other, data.holdout)
    (third,) = surrogates(config, data, torch.device("cpu"), sizes=(3,))
    assert third.run.path != first.run.path


def test_deliver_rounds_inside_the_ball() -> None:
    images = torch.tensor([[[[0, 10, 250, 255]]]], dtype=torch.uint8)
    x0 = images.float() / 255
    up = (x0 + 0.05).clamp(0, 1)  # 12.75 steps: 12 fit
    assert deliver(up, images, 0.05).tolist() == [[[[12, 22, 255, 255]]]]
    down = (x0 - 0.05).clamp(0, 1)
    assert deliver(down, images, 0.05).tolist() == [[[[0, 0, 238, 243]]]]
    assert deliver(x0, images, 0.05).tolist() == images.tolist()
    assert deliver(x0 + 0.2, images, 51 / 255).max() == 255


def test_wilson_interval_is_the_textbook_one() -> None:
    found = rate(np.array([True] * 50 + [False] * 50))
    assert found["value"] == 0.5
    assert found["low"] == pytest.approx(0.4038, abs=1e-4)
    assert found["high"] == pytest.approx(0.5962, abs=1e-4)
    assert rate(np.zeros(0, bool))["value"] is None


class Linear(torch.nn.Module):
    """Class 1 where the mean pixel is above one half: gradients are known, so is the margin."""

    def __init__(self, scale: float = 1.0, masked: bool = False) -> None:
        super().__init__()
        self.scale, self.masked = scale, masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = self.scale * (x.mean((1, 2, 3)) - 0.5)
        if self.masked:  # right answers, useless gradients
            score = score.detach() + 0 * x.mean((1, 2, 3))
        return torch.stack([-score, score], 1)


class TorchEngine:
    """Scores torch modules where a test needs no file."""

    def __init__(self, members: list[torch.nn.Module], broken: bool = False) -> None:
        self.members, self.broken = members, broken

    def run_all(self, images: Any) -> Scores:
        with torch.no_grad():
            x = torch.from_numpy(np.ascontiguousarray(images))
            logits = torch.stack([member(x) for member in self.members], 1).numpy()
        mean = logits.mean(1)
        return Scores(np.full_like(mean, np.nan) if self.broken else mean, logits)


def linear_split(values: list[int]) -> Split:
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    return Split(pixels.contiguous(), (pixels[:, 0, 0, 0] > 127).long())


def attack_linear(
    target: torch.nn.Module, values: list[int], eps: float, broken: bool = False
) -> tuple[Outcomes, list[Attack]]:
    suite = quick_suite(["surrogate"])
    outcomes = run_suite(
        suite,
        {"surrogate": [Linear()]},
        {"m": Target(TorchEngine([target], broken), [target])},  # type: ignore[arg-type]
        linear_split(values),
        [eps],
        seed=0,
    )
    return outcomes["m"], suite


def test_an_image_falls_exactly_where_the_margin_is_below_eps() -> None:
    # At 127.5 the classes meet: margins in 8-bit steps are 7.5, 12.5, 13.5 and 72.5.
    outcome, suite = attack_linear(Linear(), [120, 140, 141, 200], eps=0.05)  # 12.75 steps
    transfer = [attack for attack in suite if attack.source == "surrogate"]
    white = [attack for attack in suite if attack.threat == "white_box"]
    for chosen in (transfer, white):
        assert outcome.robust(chosen, 0.05, ["float"]).tolist() == [False, False, True, True]
        # Only 12 whole steps can be delivered: 140 - 12 = 128 is still above the line.
        assert outcome.robust(chosen, 0.05, ["delivered"]).tolist() == [False, True, True, True]
    assert outcome.outside == 0


def test_masked_gradients_are_told_by_weaker_never_beats() -> None:
    values = [110 + step for step in range(35)]
    honest, suite = attack_linear(Linear(), values, 0.05)
    assert gates.weaker_never_beats(honest, suite, [0.05]).passed
    masked, suite = attack_linear(Linear(masked=True), values, 0.05)
    gate = gates.weaker_never_beats(masked, suite, [0.05])
    assert gate.passed is False
    assert gates.verdict([gate]) == "INCONCLUSIVE"


def test_outputs_that_are_not_finite_make_it_invalid() -> None:
    outcome, _ = attack_linear(Linear(), [20, 200], 0.05, broken=True)
    gate = gates.finite([outcome])
    assert gate.passed is False
    assert gates.verdict([gate]) == "INVALID"
    assert not outcome.robust([], 0.05, ["float"]).any()


def test_a_control_that_stands_makes_it_inconclusive() -> None:
    standing, suite = attack_linear(Linear(), [0, 255, 10, 240], 0.05)
    assert gates.control_falls(standing, suite, [0.05]).passed is False
    falling, suite = attack_linear(Linear(), [125, 130, 120, 255], 0.05)
    assert gates.control_falls(falling, suite, [0.05]).passed
    assert gates.control_falls(None, suite, [0.05]).passed is None


def test_an_attack_that_leaves_its_ball_makes_it_invalid() -> None:
    outcome, _ = attack_linear(Linear(), [20, 200], 0.05)
    assert gates.eps_8bit([outcome]).passed
    outcome.outside = 1
    assert gates.verdict([gates.eps_8bit([outcome])]) == "INVALID"


def test_parity_gate_takes_the_worst() -> None:
    good, bad = Parity(5, 0.0, 1e-4, 0), Parity(5, 1.0, 1e-4, 0)
    assert gates.parity([good]).passed
    assert gates.parity([good, bad]).passed is False
    assert gates.parity(None).passed is None
    assert gates.verdict([gates.parity(None)]) == "INCONCLUSIVE"


def test_the_threshold_is_exceeded_by_one_in_twenty() -> None:
    torch.manual_seed(0)
    holdout = Split(
        torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8), torch.zeros(200).long()
    )
    members: list[torch.nn.Module] = [Linear(20), Linear(-30)]
    engine: Any = TorchEngine(members)
    found = calibrate(engine, holdout)
    scores = engine.run_all(holdout.images.numpy().astype(np.float32) / 255)
    assert 0.04 <= (scores.disagreement > found["threshold"]).mean() <= 0.05
    assert found["calibration_images"] == 200
