"""The page says what the records say, and its statistics are what they claim to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evidence import cells, claims, record, tables
from benchmarks.evidence.drawing import key, panels, plot
from benchmarks.evidence.page import DOCS, page
from benchmarks.evidence.paired import Difference, difference, share
from benchmarks.evidence.record import Record, packed, unpacked
from benchmarks.evidence.rules import RULES
from dverge_serve.engine.outputs import Scores

N = 360


def made(name: str, seed: int, right: float, gradients: int = 100) -> Record:
    """A record of a model that gets a share of the images right, the first ones."""
    bits = packed(np.arange(N) < right * N)
    outcomes = {what: {"0.1": bits, "0.2": bits} for what in ("transfer", "white_box")}
    figures: dict[str, object] = {**outcomes, "clean": bits}
    rate = {"value": 0.9, "attacked": 40, "n": 40}
    return {
        "schema_version": record.SCHEMA_VERSION,
        "definition": {},
        "definition_sha256": "",
        "recipe": "digits",
        "name": name,
        "seed": seed,
        "n": N,
        "eps": [0.1, 0.2],
        "outcomes": figures,
        "rules": dict.fromkeys(RULES, figures),
        "alarm": [
            {"attack": "transfer", "eps": 0.2}
            | {"auroc": rate, "tpr_at_0.05": rate, "fpr_at_0.05": rate}
        ],
        "training": {"gradient_evaluations": {"a": gradients}, "seconds": {"a": 1.0, "b": 2.0}},
        "verdict": "VALID",
        "gates_not_passed": [],
        "machine": {
            "cpu": "x",
            "cores": 2,
            "python": "3",
            "torch": "2",
            "onnxruntime": "1",
            "load_average_before": 0.5,
        },
    }


def seeds(name: str, shares: Sequence[float], gradients: int = 100) -> list[Record]:
    return [made(name, seed, right, gradients) for seed, right in enumerate(shares)]


def test_the_page_is_what_the_records_say() -> None:
    assert (DOCS / "results.md").read_text() == page(record.read()), (
        "run `python -m benchmarks.evidence --page`"
    )


def test_the_plots_show_the_records_figures() -> None:
    drawn = panels(tables.by_name(record.read(), "digits"))
    for name, (lines, _) in drawn.items():
        assert key(lines) in (DOCS / "results" / f"{name}.svg").read_text(), name
    named = set(re.findall(r"\(results/(\w+)\.svg\)", (DOCS / "results.md").read_text()))
    assert named == set(drawn)


def test_every_record_belongs_to_a_cell() -> None:
    known = {cell.slug for cell in cells.every()}
    assert {path.stem for path in record.FOLDER.glob("*.json")} <= known


def test_a_plot_is_the_same_for_the_same_figures() -> None:
    lines, across = panels({"dverge-3": seeds("dverge-3", [0.9])})["methods"]
    one, other = plot(lines, across), plot(lines, across)
    assert one == other
    assert len(one) < 60_000
    assert b"/tmp" not in one


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_bits_come_back(values: list[bool]) -> None:
    assert unpacked(packed(np.array(values)), len(values)).tolist() == values


def test_votes_are_counted_and_ties_go_to_the_likelier_class() -> None:
    members = np.array(
        [
            [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]],  # two votes against one loud one
            [[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]],  # one vote each
        ],
        dtype=np.float32,
    )
    scores = Scores(members.mean(axis=1), members)
    answers = {name: rule(scores).argmax(axis=1).tolist() for name, rule in RULES.items()}
    assert answers["mean-logits"] == [2, 0]
    assert answers["vote"] == [0, 0]
    soft = np.exp(members) / np.exp(members).sum(axis=-1, keepdims=True)
    assert answers["mean-softmax"] == soft.mean(axis=1).argmax(axis=1).tolist()


def test_a_paired_difference_is_exact_where_nothing_varies() -> None:
    same = np.ones((3, 50), dtype=bool)
    assert difference(same, same) == Difference(0.0, 0.0, 0.0)
    assert difference(same, ~same) == Difference(1.0, 1.0, 1.0)


def test_the_bootstrap_interval_is_as_wide_as_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    ours = rng.random((1, 2000)) < 0.9
    theirs = rng.random((1, 2000)) < 0.8
    found = difference(ours, theirs)
    apart = ours.astype(float) - theirs
    reach = 1.96 * apart.std() / np.sqrt(apart.size)
    assert found.low == pytest.approx(apart.mean() - reach, abs=0.003)
    assert found.high == pytest.approx(apart.mean() + reach, abs=0.003)


def test_seeds_that_differ_widen_the_interval() -> None:
    theirs = np.zeros((2, 100), dtype=bool)
    alike, apart = np.zeros((2, 100), dtype=bool), np.zeros((2, 100), dtype=bool)
    alike[:, :50], apart[0] = True, True
    steady, shaky = difference(alike, theirs), difference(apart, theirs)
    assert steady.value == shaky.value == 0.5
    assert shaky.low == 0.0
    assert steady.low > 0.35


def test_the_same_images_again_do_not_narrow_an_interval() -> None:
    once = np.arange(N)[None] < 0.9 * N
    assert share(once).low == share(np.repeat(once, 3, axis=0)).low


def test_a_fast_recipe_is_judged_by_cost_and_by_what_it_loses() -> None:
    variants = {
        "exact": seeds("exact", [0.95, 0.95, 0.95], 400),
        "good": seeds("good", [0.95, 0.95, 0.95], 100),
        "bad": seeds("bad", [0.9, 0.9, 0.9], 100),
        "dear": seeds("dear", [0.95, 0.95, 0.95], 101),
    }
    good, bad, dear, missing = claims.fast_is_not_inferior(
        variants, "exact", ("good", "bad", "dear", "missing")
    )
    assert "**non-inferior**" in good
    assert "25% of the gradient evaluations, seeds: 3," in good
    assert "**not shown to be non-inferior** in clean -5.0" in bad
    assert "more than a quarter" in dear
    assert "not run yet" in missing
    fewer = variants | {"exact": seeds("exact", [0.95, 0.95], 400)}
    assert "seeds: 2," in claims.fast_is_not_inferior(fewer, "exact", ("good",))[0]


def test_claims_say_where_they_do_not_hold() -> None:
    names = ("dverge-3", "standard-3", "adp-3", "gal-3")
    better = {name: seeds(name, [0.9 if name == "dverge-3" else 0.5] * 3) for name in names}
    assert claims.more_robust_than_earlier_methods(better).startswith("**Holds**")
    worse = better | {"gal-3": seeds("gal-3", [0.92] * 3)}
    told = claims.more_robust_than_earlier_methods(worse)
    assert told.startswith("**Does not hold")
    assert "GAL at eps 0.1: -2.2" in told
    assert "ADP" not in told
    assert claims.more_robust_than_earlier_methods({}) == claims.MISSING


@pytest.mark.parametrize(("flat", "told"), [(True, "**Holds**"), (False, "**Does not hold**")])
def test_sizes_are_judged_for_both_methods(flat: bool, told: str) -> None:
    sizes = {2: 0.6, 8: 0.9}
    variants = {f"dverge-{n}": seeds(f"dverge-{n}", [v] * 3) for n, v in sizes.items()}
    for n, value in sizes.items():
        variants[f"standard-{n}"] = seeds(f"standard-{n}", [0.5 if flat else value] * 3)
    assert claims.grows_with_members(variants).startswith(told)


def test_sizes_may_hold_at_some_radii_alone() -> None:
    variants = {name: seeds(name, [0.5] * 3) for name in ("standard-2", "standard-8")}
    variants |= {"dverge-2": seeds("dverge-2", [0.5] * 3), "dverge-8": seeds("dverge-8", [0.5] * 3)}
    for each in variants["dverge-8"]:
        each["outcomes"]["transfer"]["0.2"] = packed(np.ones(N, dtype=bool))
    told = claims.grows_with_members(variants)
    assert told.startswith("**Holds in part**")
    assert "in transfer 0.2; not in transfer 0.1, white-box 0.1, white-box 0.2." in told


def test_a_page_of_records_has_a_row_for_each_variant(tmp_path: Path) -> None:
    records = seeds("dverge-3", [0.9, 0.95, 1.0]) + seeds("standard-3", [0.5, 0.5])
    text = page(records)
    assert "| **DVERGE** | 95.0 (92–97) |" in text
    assert "| standard | 50.0 (45–55) |" in text
    assert "$" not in text
    assert "digits-dverge-3 (3)" in text.split("other settings than today's: ")[1]
