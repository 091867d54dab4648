"""The suite: images break where their margins say so; rounding, the cache, skipped images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.images import to_float
from tests.verification.models import EPS, Linear, TorchEngine, attack_linear, linear_split
from training.pgd import Norm
from verification.attacks.attack import NOTHING, Attack, Crafted, Threat
from verification.attacks.cache import cached, prune
from verification.attacks.gradient_attack import GradientAttack, Noise
from verification.attacks.outcomes import Outcomes, line
from verification.attacks.perturbation import (
    count_norm_violations,
    decode_fp16,
    encode_fp16,
    quantize_uint8,
)
from verification.attacks.presets import Variant, suite
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.config import SUBSTITUTE
from verification.metrics.robust_accuracy import figures


def test_an_image_breaks_exactly_where_the_margin_is_below_eps() -> None:
    # At 127.5 the classes meet: margins in 8-bit steps are 7.5, 12.5, 13.5 and 72.5.
    outcome, chosen = attack_linear(Linear(), [120, 140, 141, 200])
    transfer = [attack for attack in chosen if attack.source == "surrogate"]
    white = [attack for attack in chosen if attack.threat == "white_box"]
    for attacks in (transfer, white):
        assert outcome.robust(attacks, EPS, ["float"]).tolist() == [False, False, True, True]
        # In 8 bits only 12 whole steps fit: 140 - 12 = 128 is still above the line.
        assert outcome.robust(attacks, EPS, ["delivered"]).tolist() == [False, True, True, True]
    assert outcome.violations == 0


def test_quantization_rounds_inside_the_ball() -> None:
    images = np.array([[[[0, 10, 250, 255]]]], np.uint8)
    x0: Any = to_float(images)
    up: Any = np.clip(x0 + np.float32(0.05), 0, 1)  # 12.75 steps: 12 fit
    assert quantize_uint8(up, images, 0.05).tolist() == [[[[12, 22, 255, 255]]]]
    down: Any = np.clip(x0 - np.float32(0.05), 0, 1)
    assert quantize_uint8(down, images, 0.05).tolist() == [[[[0, 0, 238, 243]]]]
    assert quantize_uint8(x0, images, 0.05).tolist() == images.tolist()
    assert quantize_uint8(x0 + np.float32(0.2), images, 51 / 255).max() == 255
    # In L2 every change shrinks, so the length does too.
    quantized = quantize_uint8(up, images, 0.1, "l2")
    assert quantized.tolist() == [[[[12, 22, 255, 255]]]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.01, 0.03, 0.1, 0.5])
def test_what_is_stored_in_float16_stays_in_the_ball(norm: Norm, eps: float) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    attack = Noise(name="n", threat="transfer", source="none", norm=norm)
    clean = torch.from_numpy(to_float(images.numpy()))
    adversarial = attack.run(NOTHING, clean, torch.zeros(20), eps, 0).images
    deltas = encode_fp16(adversarial, images, eps, attack.norm)
    pixels = images.numpy()
    floats = decode_fp16(pixels, deltas)
    assert np.abs(floats - adversarial.numpy()).max() <= eps * 2**-10
    quantized = quantize_uint8(floats, pixels, eps, attack.norm)
    assert count_norm_violations(floats, quantized, pixels, eps, attack.norm) == 0
    assert count_norm_violations(floats + 1, quantized, pixels, eps, attack.norm) == 20
    assert count_norm_violations(floats, 255 - pixels, pixels, 1e-3, attack.norm) >= 19


def test_an_interrupted_suite_goes_on_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    whole = suite(Variant(preset="quick", classes=2), ["surrogate"])
    chosen = [attack for attack in whole if not attack.skip_broken]  # all are run
    split = linear_split([120, 140])
    target = Target(TorchEngine([Linear()]), [Linear()], "weights of the model")
    made: list[str] = []

    def count(kind: type[Attack]) -> None:
        run: Callable[..., Crafted] = kind.run

        def counting(attack: Attack, *rest: object) -> Crafted:
            if len(made) == 4 and not resumed:
                raise KeyboardInterrupt
            made.append(attack.name)
            return run(attack, *rest)

        monkeypatch.setattr(kind, "run", counting)

    def run() -> dict[tuple[str, float, str], list[bool]]:
        sources = {"surrogate": ([Linear()], "weights of the surrogate")}
        outcome = run_suite(chosen, sources, {"m": target}, split, [EPS], seed=0)["m"]
        return {key: mask.tolist() for key, mask in outcome.survived.items()}

    count(Noise)
    count(GradientAttack)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = True
    found = run()
    crafted = sum(attack.restarts for attack in chosen if not attack.asks)
    assert len(made) == crafted  # none of the first four twice
    assert run() == found
    assert len(made) == crafted
    files = sorted((tmp_path / "attacks").glob("*.npz"))
    assert len(files) == crafted
    for damaged in files:
        damaged.write_bytes(b"cut short")
    assert run() == found
    assert len(made) == 2 * crafted  # every damaged one again
    for number, damaged in enumerate(sorted((tmp_path / "attacks").glob("*.npz"))):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 3 + number] ^= 0xFF
        damaged.write_bytes(data)
    assert run() == found


def attacked(*chosen: Attack) -> Outcomes:
    """Run attacks on a linear model, of which 120 and 140 are weak images and 200 is not."""
    target = Target(TorchEngine([Linear()]), [Linear()])
    split = linear_split([120, 140, 200])
    return run_suite(chosen, {}, {"m": target}, split, [EPS], seed=0)["m"]


def test_pruning_the_cache_deletes_the_oldest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    for index in range(4):
        cached(["test", index], lambda: {"x": np.zeros(100)})
    files = sorted((tmp_path / "attacks").glob("*.npz"))
    for age, file in enumerate(files):
        os.utime(file, (age, age))
    prune(limit=2 * files[0].stat().st_size + 20)
    assert sorted((tmp_path / "attacks").glob("*.npz")) == files[2:]


def test_the_matrix_marks_images_that_an_attack_skipped() -> None:
    first = GradientAttack(name="pgd", threat="white_box", source="target", loss="cw", steps=10)
    second = replace(first, name="again", skip_broken=True)
    outcome = attacked(first, second)
    # 140 breaks as a float alone, which is enough.
    ran = outcome.ran[second.name, EPS]
    assert line(outcome.survived[second.name, EPS, "float"], ran) == "--1"


def test_only_the_images_that_an_attack_was_run_on_are_scored() -> None:
    seen: list[int] = []

    class Noted(TorchEngine):
        def run_all(self, images: Any) -> Scores:
            seen.append(len(images))
            return super().run_all(images)

    first = GradientAttack(name="a", threat="white_box", source="target", steps=10, loss="cw")
    chosen = [first, *(replace(first, name=name, skip_broken=True) for name in "bc")]
    target = Target(Noted([Linear()]), [Linear()])
    found = run_suite(chosen, {}, {"m": target}, linear_split([10, 120, 120]), [EPS], seed=0)["m"]
    assert seen == [3, *(3, 3), *(1, 1), *(1, 1)]  # clean; then each as floats and in 8 bits
    assert found.robust(chosen, EPS).tolist() == [True, False, False]
    # The only one left has the margin of the only one scored; the others keep theirs.
    assert (found.margins[EPS, "white_box"] > 0).tolist() == [True, False, False]


def test_attacks_by_queries_share_a_random_sample_and_count_their_queries() -> None:
    chosen = [
        Square(name="square", queries=5, sample=2),
        RayS(name="rays", queries=40, sample=2),
    ]
    outcome = attacked(*chosen)
    sampled = outcome.ran["square", EPS]
    assert sampled.sum() == 2
    assert np.array_equal(sampled, outcome.ran["rays", EPS])
    again = Outcomes.from_json(outcome.to_json())
    for attack in chosen:
        spent = outcome.queries[attack.name, EPS]
        assert (spent[sampled] > 0).all()
        assert not spent[~sampled].any()
        assert again.queries[attack.name, EPS].tolist() == spent.tolist()
        assert outcome.robust([attack], EPS)[~sampled].all()
    table = figures(outcome, chosen, [EPS])["robust_accuracy"][0]["all"]
    broken = ~outcome.robust(chosen[1:], EPS)
    assert table["attacks"]["rays"] == 1 - broken.sum() / 2


def test_one_search_by_labels_passes_every_radius() -> None:
    target = Target(TorchEngine([Linear()]), None)
    split, radii = linear_split([120, 138, 200]), [0.02, 0.05, 0.1]
    chosen = [RayS(name="rays", queries=60)]
    outcome = run_suite(chosen, {}, {"m": target}, split, radii, seed=0)["m"]
    # At 127.5 the classes meet: margins of .029, .041 and .284.
    broken = {eps: (~outcome.robust(chosen, eps)).tolist() for eps in radii}
    assert broken == {
        0.02: [False, False, False],
        0.05: [True, True, False],
        0.1: [True, True, False],
    }
    spent = [outcome.queries["rays", eps] for eps in radii]
    assert (spent[2][:2] <= spent[1][:2]).all()
    assert (spent[1][:2] < spent[0][:2]).all()
    assert spent[0].tolist() == [60, 60, 60]


def test_what_stood_in_a_larger_ball_is_not_attacked_again_in_a_smaller_one() -> None:
    plain = GradientAttack(
        name="plain",
        threat="white_box",
        source="target",
        steps=1,
        rel_stepsize=1.0,
        random_start=False,
    )
    rest = replace(plain, name="rest", loss="cw", skip_broken=True)
    more = replace(rest, name="more")
    target = Target(TorchEngine([Linear()]), [Linear()])
    split = linear_split([120, 145, 110, 200])  # break from .03, .07, .07 and .29 on
    run: list[tuple[str, float]] = []
    outcome = run_suite(
        [plain, rest, more],
        {},
        {"m": target},
        split,
        [0.05, 0.1, 0.2],
        seed=0,
        keep=lambda name, eps, *_: run.append((name, eps)),
    )["m"]
    order = [("rest", 0.2), ("more", 0.2), ("rest", 0.1), ("more", 0.1), ("rest", 0.05)]
    assert run[3:8] == order  # the largest ball first
    standing = {eps: outcome.robust([plain], eps) for eps in (0.05, 0.1, 0.2)}
    assert outcome.ran["rest", 0.2].tolist() == standing[0.2].tolist() == [False] * 3 + [True]
    # The last image stood in the largest ball; the two others in the smallest alone.
    assert not outcome.ran["rest", 0.1].any()
    assert outcome.ran["rest", 0.05].tolist() == [False, True, True, False]
    assert [int(outcome.robust([plain, rest, more], eps).sum()) for eps in (0.05, 0.1, 0.2)] == [
        3,
        1,
        1,
    ]


def test_an_image_broken_by_another_threat_is_not_skipped() -> None:
    """Each threat's figure is of its own attacks alone, whatever the others broke."""
    first: dict[str, Any] = {"loss": "cw", "steps": 10}
    chosen = [
        GradientAttack(name="pgd", threat="white_box", source="target", **first),
        GradientAttack(name="vmi", threat="transfer", source="s", skip_broken=True, **first),
        GradientAttack(name="mora", threat="white_box", source="target", skip_broken=True, **first),
        Square(name="square", queries=5, skip_broken=True),
    ]
    target = Target(TorchEngine([Linear()]), [Linear()])
    sources = {"s": ([Linear()], "s")}
    split = linear_split([120, 137, 250])  # no attack breaks the last
    outcome = run_suite(chosen, sources, {"m": target}, split, [EPS], seed=0)["m"]
    ran = {name: mask.tolist() for (name, _), mask in outcome.ran.items()}
    assert ran == {
        "pgd": [True, True, True],
        "vmi": [True, True, True],
        "mora": [False, False, True],
        "square": [True, True, True],
    }


def test_a_target_is_not_its_own_surrogate() -> None:
    chosen = [
        GradientAttack(name=f"from {name}", threat="transfer", source=name, loss="ce", steps=1)
        for name in ("own", "other")
    ]
    sources = {name: ([Linear()], name) for name in ("own", "other")}
    target = Target(TorchEngine([Linear()]), None, "own")
    outcome = run_suite(chosen, sources, {"m": target}, linear_split([120]), [EPS], seed=0)["m"]
    assert {attack for attack, _, _ in outcome.survived} == {"from other"}


def test_dear_attacks_run_on_the_images_that_others_brought_nearest() -> None:
    plain = GradientAttack(name="plain", threat="transfer", source="s", loss="cw")
    few = replace(plain, name="few", skip_broken=True, nearest=0.5)
    target = Target(TorchEngine([Linear()]), None)
    # 120 breaks; of the others the distance to 127.5 is 17.5, 40, 22.5 and 100.
    split = linear_split([110, 88, 120, 150, 228])
    found = run_suite([plain, few], {"s": ([Linear()], "s")}, {"m": target}, split, [EPS], seed=0)
    outcome = found["m"]
    assert outcome.ran["few", EPS].tolist() == [True, False, False, True, False]
    table = figures(outcome, [plain, few], [EPS])["robust_accuracy"][0]["transfer"]
    # The strongest attack is one that was run on all images.
    assert table["worst"] == {"attack": "plain", "value": table["attacks"]["plain"]}
    assert table["worst"]["value"] == 0.8


def test_a_target_is_not_attacked_by_its_kin() -> None:
    attack = GradientAttack(name="a", threat="transfer", source="s", steps=1)
    engine, sources = TorchEngine([Linear()]), {"s": ([Linear()], "part of both")}
    targets = {
        "model": Target(engine, None, "model"),
        "control": Target(engine, None, "other", frozenset({"part of both"})),
    }
    found = run_suite([attack], sources, targets, linear_split([120]), [EPS], seed=0)
    assert found["model"].has(attack, EPS)
    assert not found["control"].has(attack, EPS)


def test_an_attack_can_leave_out_the_control_alone() -> None:
    own: dict[str, Any] = {"threat": "white_box", "source": "target", "loss": "ce", "steps": 1}
    chosen = [
        GradientAttack(name="everybody", **own),
        GradientAttack(name="no control", control=False, **own),
    ]
    targets = {
        name: Target(TorchEngine([Linear()]), [Linear()], name)
        for name in ("model", "control", "against")
    }
    outcomes = run_suite(chosen, {}, targets, linear_split([120]), [EPS], seed=0)
    ran = {name: {attack for attack, _ in found.ran} for name, found in outcomes.items()}
    both = {"everybody", "no control"}
    assert ran == {"model": both, "control": {"everybody"}, "against": both}


def test_an_attack_with_nothing_left_to_attack_asked_no_queries() -> None:
    strong = GradientAttack(name="strong", threat="white_box", source="target", steps=3, loss="cw")
    rest = replace(strong, name="rest", skip_broken=True)
    found = run_suite(
        [strong, rest], {}, {"m": Target(TorchEngine([Linear()]), [Linear()])},
        linear_split([127, 128]), [EPS], seed=0,
    )  # fmt: skip
    assert not found["m"].robust([strong], EPS).any()
    assert found["m"].queries == {}


def test_the_answers_of_a_foreign_classifier_are_cached_with_its_contract() -> None:
    square = Square(name="square", queries=2)

    def key(contract: str) -> str:
        engine: Any = SimpleNamespace(sha256="file", card=SimpleNamespace(weights_sha256=contract))
        access = square.access(Target(engine, None))
        assert access is not None
        return access[1]

    assert key("mean 0") != key("mean 1")


def test_attacks_from_the_substitute_are_scored_on_the_model_alone() -> None:
    engine, sources = TorchEngine([Linear()]), {SUBSTITUTE: ([Linear()], "stolen")}
    names = ("model", "control", "against")
    targets = {name: Target(engine, None, name) for name in names}
    one = GradientAttack(name="a", threat="queries", source=SUBSTITUTE, steps=1, control=False)
    found = run_suite([one], sources, targets, linear_split([120]), [EPS], seed=0)
    assert [name for name in names if found[name].has(one, EPS)] == ["model"]
    plain = replace(one, threat="transfer", source="s")
    sources = {"s": ([Linear()], "s")}
    found = run_suite([plain], sources, targets, linear_split([120]), [EPS], seed=0)
    assert [name for name in names if found[name].has(plain, EPS)] == ["model", "against"]


@pytest.mark.parametrize("source", ["target", "surrogate"])
def test_later_starts_on_the_target_leave_out_what_is_broken(source: str) -> None:
    threat: Threat = "white_box" if source == "target" else "transfer"
    attack = GradientAttack(
        name="pgd", threat=threat, source=source, loss="cw", steps=10, restarts=3
    )
    target = Target(TorchEngine([Linear()]), [Linear()])
    split = linear_split([120, 140, 200])
    sources = {"surrogate": ([Linear()], "of the surrogate")}
    outcome = run_suite([attack], sources, {"m": target}, split, [EPS], seed=0)["m"]
    # 120 is broken; 140 as a float alone, so that the 8-bit version is tried again; 200 stands.
    # Transfer images are made for any number of targets, once.
    assert outcome.scored == (3 + 2 + 2 if source == "target" else 3 + 3 + 3)
    assert line(outcome.ran["pgd", EPS]) == "111"
    found = {key[2]: line(mask) for key, mask in outcome.survived.items()}
    assert found == {"float": "001", "delivered": "011"}
