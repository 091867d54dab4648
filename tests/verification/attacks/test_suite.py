"""The suite: who falls where the margins say so, rounding, what is remembered, what is skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.verification.models import EPS, Linear, TorchEngine, attack_linear, linear_split
from verification.attacks import cache as vault
from verification.attacks import suite as suites
from verification.attacks.attack import Attack, craft
from verification.attacks.outcomes import Target, line
from verification.attacks.perturbation import (
    count_norm_violations,
    decode_fp16,
    encode_fp16,
    quantize_uint8,
)
from verification.attacks.presets import Variant, suite
from verification.attacks.suite import run_suite


def test_an_image_falls_exactly_where_the_margin_is_below_eps() -> None:
    # At 127.5 the classes meet: margins in 8-bit steps are 7.5, 12.5, 13.5 and 72.5.
    outcome, chosen = attack_linear(Linear(), [120, 140, 141, 200])
    transfer = [attack for attack in chosen if attack.source == "surrogate"]
    white = [attack for attack in chosen if attack.threat == "white_box"]
    for attacks in (transfer, white):
        assert outcome.robust(attacks, EPS, ["float"]).tolist() == [False, False, True, True]
        # Only 12 whole steps can be delivered: 140 - 12 = 128 is still above the line.
        assert outcome.robust(attacks, EPS, ["delivered"]).tolist() == [False, True, True, True]
    assert outcome.outside == 0


def test_deliver_rounds_inside_the_ball() -> None:
    images = np.array([[[[0, 10, 250, 255]]]], np.uint8)
    x0: Any = images.astype(np.float32) / 255
    up: Any = np.clip(x0 + np.float32(0.05), 0, 1)  # 12.75 steps: 12 fit
    assert quantize_uint8(up, images, 0.05).tolist() == [[[[12, 22, 255, 255]]]]
    down: Any = np.clip(x0 - np.float32(0.05), 0, 1)
    assert quantize_uint8(down, images, 0.05).tolist() == [[[[0, 0, 238, 243]]]]
    assert quantize_uint8(x0, images, 0.05).tolist() == images.tolist()
    assert quantize_uint8(x0 + np.float32(0.2), images, 51 / 255).max() == 255
    # In L2 every change shrinks, so the length does too.
    delivered = quantize_uint8(up, images, 0.1, "l2")
    assert delivered.tolist() == [[[[12, 22, 255, 255]]]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.01, 0.03, 0.1, 0.5])
def test_what_is_kept_in_float16_stays_in_the_ball(norm: str, eps: float) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    attack = Attack(name="n", threat="transfer", source="none", kind="noise", norm=norm)  # type: ignore[arg-type]
    split = linear_split([0] * 20)
    split = type(split)(images, split.labels)
    adversarial = craft(attack, [], split, eps, 0)
    halves = encode_fp16(adversarial, images, eps, attack.norm)
    pixels = images.numpy()
    floats = decode_fp16(pixels, halves)
    assert np.abs(floats - adversarial.numpy()).max() <= eps * 2**-10
    delivered = quantize_uint8(floats, pixels, eps, attack.norm)
    assert count_norm_violations(floats, delivered, pixels, eps, attack.norm) == 0
    assert count_norm_violations(floats + 1, delivered, pixels, eps, attack.norm) == 20
    assert count_norm_violations(floats, 255 - pixels, pixels, 1e-3, attack.norm) >= 19


def test_an_interrupted_suite_goes_on_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    chosen = suite(Variant(preset="quick", classes=2), ["surrogate"], [EPS])
    split = linear_split([120, 140])
    target = Target(TorchEngine([Linear()]), [Linear()], "weights of the model")
    made: list[str] = []

    def counting(attack: Attack, *rest: object) -> object:
        if len(made) == 4 and not resumed:
            raise KeyboardInterrupt
        made.append(attack.name)
        return craft(attack, *rest)  # type: ignore[arg-type]

    def run() -> dict[tuple[str, float, str], list[bool]]:
        sources = {"surrogate": ([Linear()], "weights of the surrogate")}
        outcome = run_suite(chosen, sources, {"m": target}, split, [EPS], seed=0)["m"]
        return {key: mask.tolist() for key, mask in outcome.survived.items()}

    monkeypatch.setattr(suites, "craft", counting)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = True
    whole = run()
    crafted = sum(attack.restarts for attack in chosen if attack.kind != "square")
    assert len(made) == crafted  # none of the first four twice
    assert run() == whole
    assert len(made) == crafted
    for damaged in (tmp_path / "attacks").glob("*.npz"):
        damaged.write_bytes(b"cut short")
    assert run() == whole
    for number, damaged in enumerate(sorted((tmp_path / "attacks").glob("*.npz"))):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 3 + number] ^= 0xFF
        damaged.write_bytes(data)
    assert run() == whole


def test_the_vault_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    for index in range(4):
        vault.keep(["test", index], lambda: {"x": np.zeros(100)})
    files = sorted((tmp_path / "attacks").glob("*.npz"))
    for age, file in enumerate(files):
        os.utime(file, (age, age))
    vault.prune(limit=2 * files[0].stat().st_size + 20)
    assert sorted((tmp_path / "attacks").glob("*.npz")) == files[2:]


def test_attacks_that_skip_the_fallen_are_told_apart_in_the_matrix() -> None:
    outcome, chosen = attack_linear(Linear(), [120, 140, 200])
    (square,) = [attack for attack in chosen if attack.kind == "square"]
    assert square.standing_only
    assert outcome.ran[square.name, EPS].tolist() == [False, True, True] or outcome.ran[
        square.name, EPS
    ].tolist() == [False, False, True]
    told = line(outcome.survived[square.name, EPS, "float"], outcome.ran[square.name, EPS])
    assert told[0] == "-"
    assert told[2] == "1"
    assert outcome.queries[square.name, EPS].tolist()[0] == 0
    assert outcome.queries[square.name, EPS].tolist()[2] == square.queries


def test_an_image_that_fell_to_another_threat_is_not_skipped() -> None:
    """Each threat's figure is of its own attacks alone, whatever the others broke."""
    first: dict[str, Any] = {"loss": "cw", "steps": 10}
    chosen = [
        Attack(name="pgd", threat="white_box", source="target", **first),
        Attack(name="vmi", threat="transfer", source="s", standing_only=True, **first),
        Attack(name="mora", threat="white_box", source="target", standing_only=True, **first),
        Attack(
            name="square",
            threat="queries",
            source="target",
            kind="square",
            queries=5,
            standing_only=True,
        ),
    ]
    target = Target(TorchEngine([Linear()]), [Linear()])
    sources = {"s": ([Linear()], "s")}
    split = linear_split([120, 137, 250])  # the last stands whatever happens
    outcome = run_suite(chosen, sources, {"m": target}, split, [EPS], seed=0)["m"]
    ran = {name: mask.tolist() for (name, _), mask in outcome.ran.items()}
    assert ran == {
        "pgd": [True, True, True],
        "vmi": [True, True, True],
        "mora": [False, False, True],
        "square": [False, False, True],
    }


def test_a_target_is_not_its_own_surrogate() -> None:
    chosen = [
        Attack(name=f"from {name}", threat="transfer", source=name, loss="ce", steps=1)
        for name in ("own", "other")
    ]
    sources = {name: ([Linear()], name) for name in ("own", "other")}
    target = Target(TorchEngine([Linear()]), None, "own")
    outcome = run_suite(chosen, sources, {"m": target}, linear_split([120]), [EPS], seed=0)["m"]
    assert {attack for attack, _, _ in outcome.survived} == {"from other"}


@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_presets_are_what_they_say(preset: str) -> None:
    chosen = suite(Variant(preset=preset, classes=10, reference=True), ["a", "b", "c"], [0.1, 0.2])
    names = [attack.name for attack in chosen]
    assert len(set(names)) == len(names)
    skipping = {"vmi", "square", "reweighted", "autoattack"}
    for attack in chosen:
        assert attack.standing_only is (attack.name.split("-")[0].split()[0] in skipping)
        assert attack.standing_only or not any(
            each.standing_only for each in chosen[: chosen.index(attack)]
        )
    (doubled,) = [attack for attack in chosen if attack.gate == "converged"]
    (base,) = [attack for attack in chosen if attack.name == "pgd-cw on mean-logits"]
    assert (doubled.steps, doubled.restarts) == (2 * base.steps, 2 * base.restarts)
    if preset != "quick":  # the paper: 5 versions for each surrogate and loss, 30 in all
        transfer = [attack for attack in chosen if attack.source in "abc"]
        protocol = [attack for attack in transfer if not attack.standing_only]
        assert sum(attack.restarts for attack in protocol) == 30
        assert {attack.steps for attack in protocol} == {100}
        assert {attack.step_share for attack in protocol} == {0.2}
        assert (base.steps, base.restarts) == (50, 5)
    if preset == "full":
        (square,) = [attack for attack in chosen if attack.kind == "square"]
        assert square.queries == 5000
    two = suite(Variant(preset=preset, classes=2), ["a"], [0.1])
    assert not any(attack.loss == "dlr" for attack in two)
    assert not any(
        attack.kind == "square"
        for attack in suite(Variant(preset=preset, classes=3, norm="l2"), ["a"], [1.0])
    )


def test_every_kind_of_attack_of_the_full_preset_runs_and_finds_the_weak_image() -> None:
    chosen = [
        replace(attack, steps=min(attack.steps, 6), restarts=1, queries=min(attack.queries, 60))
        for attack in suite(Variant(preset="full", classes=2, skips=False), ["s"], [EPS])
    ]
    chosen = [replace(attack, standing_only=False) for attack in chosen]
    split = linear_split([125, 200])
    target = Target(TorchEngine([Linear(), Linear(5.0)]), [Linear(), Linear(5.0)], "")
    outcome = run_suite(chosen, {"s": ([Linear()], "s")}, {"m": target}, split, [EPS], seed=0)["m"]
    for attack in chosen:
        if attack.kind != "noise":
            assert outcome.robust([attack], EPS).tolist() == [False, True], attack.name
