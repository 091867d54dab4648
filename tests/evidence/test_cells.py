"""Cells run once, leave what the page needs, and are run again only when they are other cells."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import cells, protocol, record
from benchmarks.evidence.__main__ import run_cells
from benchmarks.evidence.cells import FAST, Cell
from benchmarks.evidence.limit import TimeUp, within
from benchmarks.evidence.paired import stack
from training.recipe import load_recipe
from training.runs.directory import Run

ROOT = Path(__file__).parents[2]
TINY = {
    "width": 8,
    "standard.epochs": 2,
    "dverge.epochs": 1,
    "data.train_limit": 320,
    "batch_size": 64,
}
QUICK = replace(
    protocol.DIGITS,
    overrides=tuple(TINY.items()),
    surrogates=("standard-2",),
    eps=(0.1,),
    images=24,
)


def cell(**changes: object) -> Cell:
    made = Cell(protocol=QUICK, name="dverge-2", method="dverge", members=2, seed=0)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of one tiny cell."""
    folder = tmp_path_factory.mktemp("results")
    assert run_cells([cell()], folder) == {}
    return folder


def test_a_cell_leaves_its_figures_and_its_outcomes(results: Path) -> None:
    (found,) = record.read(results)
    assert found["n"] == 24
    assert stack([found], "clean").mean() == found["figures"]["clean"]
    for threat in ("transfer", "white_box"):
        right = stack([found], threat, 0.1)
        assert right.mean() == found["figures"][threat]["0.1"]
        assert not (right & ~stack([found], "clean")).any()
    assert set(found["rules"]) == {"mean-logits", "mean-softmax", "vote"}
    assert found["training"]["gradient_evaluations"] == {
        "standard": 2 * 288 * 2,
        "dverge": 1 * (3 + 1) * 288 * 2,
    }
    assert {row["attack"] for row in found["alarm"]} == {"transfer", "white_box", "detector-aware"}


def test_the_model_files_own_rule_is_the_mean_of_logits(results: Path) -> None:
    (found,) = record.read(results)
    assert (stack([found], "clean") == stack([found], "clean", rule="mean-logits")).all()
    pooled = stack([found], "white_box", 0.1, "mean-logits")
    # The record's own outcome has met one attack more: the doubled one.
    assert not (stack([found], "white_box", 0.1) & ~pooled).any()


def test_a_record_names_no_folder_of_this_machine(results: Path) -> None:
    (path,) = results.iterdir()
    text = path.read_text()
    assert str(Path.home()) not in text
    assert "/tmp" not in text
    assert len(text) < 20_000


def test_a_cell_that_is_there_is_not_run_again(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was run again")

    monkeypatch.setattr("benchmarks.evidence.measure.measure", never)
    assert run_cells([cell()], results) == {}
    with pytest.raises(AssertionError, match="run again"):
        run_cells([cell(overrides={"dverge.eps": 0.1})], results)


def test_a_record_is_current_until_a_setting_it_knows_changes(
    results: Path, tmp_path: Path
) -> None:
    assert record.current(cell(), results)
    assert not record.current(cell(overrides={"dverge.steps": 2}), results)
    assert not record.current(cell(protocol=replace(QUICK, eps=(0.1, 0.2))), results)
    assert not record.current(cell(seed=1), results)
    # A setting that came later had its default then, so the record still stands.
    found = json.loads(record.path_of(cell(), results).read_text())
    del found["definition"]["training"]["dverge"]["layer_every"]
    found["definition_sha256"] = record.fingerprint(found["definition"])
    record.path_of(cell(), tmp_path).write_text(json.dumps(found))
    assert record.current(cell(), tmp_path)


def test_what_is_not_here_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    far = cell(overrides={"precision": "bf16"})
    skipped = run_cells([far], tmp_path)
    assert skipped == {far.slug: "precision bf16, which this cpu lacks; expected fp32 or auto"}
    assert "skipped, precision bf16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cell_goes_on_where_the_time_was_used_up(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path / "work"))
    (tmp_path / "results").mkdir()

    def save_and_stop(*given: Any) -> None:  # of a training's first saved state
        save(*given)
        signal.raise_signal(signal.SIGALRM)

    save = Run.save_state
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", save_and_stop)
        assert run_cells([cell()], tmp_path / "results", minutes=60) == {}
    assert "the time is used up, cells left: 1" in capsys.readouterr().err
    assert record.read(tmp_path / "results") == []
    (run,) = (tmp_path / "work").glob("evidence/cells/*/run")
    assert Run(run).load_state() is not None

    assert run_cells([cell()], tmp_path / "results") == {}
    (found,), (whole,) = record.read(tmp_path / "results"), record.read(results)
    assert found["weights_sha256"] == whole["weights_sha256"]
    assert found["outcomes"] == whole["outcomes"]


def test_a_limit_ends_what_it_limits() -> None:
    with pytest.raises(TimeUp), within(0):
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with within(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_every_cell_has_a_file_of_its_own_and_settings_that_can_be() -> None:
    every = cells.every()
    assert len({each.slug for each in every}) == len(every)
    for each in every:
        settings = each.settings
        assert settings.seed == each.seed
        assert settings.members == each.members
        assert settings.method == each.method


def test_fast_cells_take_a_quarter_of_the_exact_ones_gradient_evaluations() -> None:
    from training.budget import gradient_evaluations

    spent = {
        each.name: sum(gradient_evaluations(each.settings, 1293).values())
        for each in cells.every()
        if each.protocol is protocol.DIGITS
    }
    fast = [name for name in spent if "-fast-" in name]
    assert fast
    assert all(spent[name] <= spent["dverge-3-exact"] / 4 for name in fast)


def test_the_list_says_what_is_there() -> None:
    command = [sys.executable, "-m", "benchmarks.evidence", "--list", "--only", "adp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [f"digits-adp-3-seed{seed}" for seed in (0, 1, 2)]


def test_the_fast_recipe_is_the_variant_that_was_measured() -> None:
    measured = load_recipe("digits", FAST["dverge-3-fast-c"])
    fast = load_recipe("digits-fast")
    assert replace(fast, name="digits", transfer=measured.transfer) == measured
