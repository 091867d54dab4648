"""The run directory: what it holds, where it may begin, and which one can be opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from tests.training.networks import tiny_config
from tests.training.refusal import one_line
from training.accuracy import accuracy
from training.config import Config
from training.data.splits import load_training, to_float
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")


def test_a_finished_run_holds_the_documented_files_and_no_others(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == {
        "config.json",
        "members.safetensors",
        "standard.safetensors",
        "checkpoint.json",
        "probe.npz",
        "metrics.jsonl",
    }


def test_config_json_holds_every_value_used(finished: Path) -> None:
    table = json.loads((finished / "config.json").read_text())
    assert Config.from_json(table, "config.json") == tiny_config()
    assert Run(finished).config == tiny_config()


def test_the_checkpoint_names_hashes_labels_and_where_they_come_from(finished: Path) -> None:
    found = Run(finished).checkpoint
    data = load_training(tiny_config().data)
    for which in ("members", "standard"):
        content = (finished / f"{which}.safetensors").read_bytes()
        assert found[f"{which}_sha256"] == sha256(content)
    assert found["schema_version"] == 1
    assert found["labels"] == list("0123456789")
    assert found["train_sha256"] == data.train.sha256
    assert (found["train_images"], found["holdout_images"]) == (90, 10)
    assert found["preprocess"] == tiny_config().data.preprocess.to_json()
    members = Run(finished).members()
    assert found["parameters"] == sum(p.numel() for m in members for p in m.parameters())
    assert found["holdout_accuracy"] == accuracy(members, data.holdout)
    assert found["provenance"]["torch"] == torch.__version__


def test_metrics_have_one_line_for_each_epoch(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    found = [(line["stage"], line["epoch"]) for line in lines]
    assert found == [("standard", 1), ("standard", 2), ("dverge", 1), ("dverge", 2)]
    for line in lines:
        assert len(line["losses"]) == 2
        assert all(0 < loss < 100 for loss in line["losses"])
        assert line["images_per_s"] > 0
    assert lines[-1]["holdout_accuracy"] == Run(finished).checkpoint["holdout_accuracy"]


def test_the_probe_is_the_first_held_out_images(finished: Path) -> None:
    holdout = load_training(tiny_config().data).holdout
    assert torch.equal(Run(finished).probe(), holdout.images[:16])


def test_a_probe_has_at_most_sixteen_images(tmp_path: Path) -> None:
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    Run(tmp_path).save_probe(images)
    assert torch.equal(Run(tmp_path).probe(), images[:16])


def test_members_come_back_as_they_were_in_evaluation_mode(finished: Path) -> None:
    run = Run(finished)
    members, standard = run.members(), run.members("standard")
    assert len(members) == len(standard) == 2
    for member in members:
        assert not member.training
        assert not any(parameter.requires_grad for parameter in member.parameters())
        assert float(member.std.min()) > 0
    images = to_float(run.probe())
    assert not torch.equal(members[0](images), members[1](images))
    assert not torch.equal(members[0](images), standard[0](images))
    assert torch.equal(members[0].mean, standard[0].mean)


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(
    finished: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # nobody's generator has a say
    for seed, same in ((0, True), (1, False)):
        run = train(tiny_config(seed=seed), tmp_path / str(seed), device=CPU)
        for name in ("members.safetensors", "standard.safetensors"):
            equal = (run.path / name).read_bytes() == (finished / name).read_bytes()
            assert equal == same, (seed, name)
        assert (run.path / "probe.npz").read_bytes() == (finished / "probe.npz").read_bytes()


def test_a_directory_that_is_not_empty_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("training.trainer.load_training", lambda _: pytest.fail("images were read"))
    with pytest.raises(UserError, match=r"is not empty.*`resume`") as caught:
        train(tiny_config(), tmp_path, device=CPU)
    one_line(caught)
    with pytest.raises(UserError, match="holds no run") as caught:
        train(tiny_config(), tmp_path, device=CPU, resume=True)
    one_line(caught)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for resume in (False, True):
        with pytest.raises(UserError, match="out is a file") as caught:
            train(tiny_config(), tmp_path / "out", device=CPU, resume=resume)
        one_line(caught)


def test_bad_data_leaves_no_directory(tmp_path: Path) -> None:
    config = tiny_config(data__name="imagefolder", data__path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no folder"):
        train(config, tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


def test_what_a_kill_left_behind_is_swept_away(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.json.x1.part").write_text("{")  # killed while writing the very first file
    assert train(tiny_config(), out, device=CPU).weights_sha256 == Run(finished).weights_sha256
    assert not list(out.glob(".*"))


def test_only_a_finished_run_can_be_opened(copy: Path, tmp_path: Path) -> None:
    assert Run.open_finished(copy).labels == tuple("0123456789")
    with pytest.raises(UserError, match="no run at"):
        Run.open_finished(tmp_path / "nowhere")
    (copy / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"is not finished.*--resume --out") as caught:
        Run.open_finished(copy)
    one_line(caught)


def test_a_file_given_as_a_run_is_no_run(finished: Path) -> None:
    with pytest.raises(UserError, match="no run at") as caught:
        Run.open_finished(finished / "members.safetensors")
    one_line(caught)


def test_a_run_of_a_newer_version_is_refused(copy: Path) -> None:
    table = json.loads((copy / "checkpoint.json").read_text())
    (copy / "checkpoint.json").write_text(json.dumps(table | {"schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2; expected version 1") as caught:
        Run.open_finished(copy)
    one_line(caught)
