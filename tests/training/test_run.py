"""The run directory: what it holds, what is refused, what damage says."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from tests.training import full_disk
from tests.training.networks import stored, tiny_config, tiny_images, tiny_members
from tests.training.stopping import StoppedError
from training import data as datasets
from training.config import Config
from training.data import load_training, to_float
from training.run import Run, follow
from training.train import accuracy, train
from training.weights import load_members, members_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "runs" / "one"
    return train(tiny_config(), out, device=CPU).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "copy"))


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
        assert 0 <= line["holdout_accuracy"] <= 1
        assert line["images_per_s"] > 0


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
    monkeypatch.setattr(datasets, "load_training", lambda _: pytest.fail("images were read"))
    with pytest.raises(UserError, match=r"is not empty.*--resume") as caught:
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


def test_resuming_nothing_starts(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = train(tiny_config(), tmp_path / "empty", device=CPU, resume=True)
    assert run.weights_sha256 == Run(finished).weights_sha256


def test_resuming_with_other_settings_names_them(copy: Path) -> None:
    config = tiny_config(dverge__eps=0.3, seed=4, data__pad=2)
    for finished in (True, False):
        if not finished:
            (copy / "checkpoint.json").unlink()
        with pytest.raises(
            UserError, match=r"other settings of data.pad, dverge.eps, seed;"
        ) as caught:
            train(config, copy, device=CPU, resume=True)
        one_line(caught)


def test_resuming_a_finished_run_does_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_training", lambda _: pytest.fail("images were read"))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in copy.iterdir()}
    run = train(tiny_config(), copy, device=CPU, resume=True)
    assert run.finished
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in copy.iterdir()} == before


def stopped_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run that ended between the stages."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            train(tiny_config(), out, device=CPU)
    return Run(out)


def test_resuming_with_other_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(tmp_path / "out", monkeypatch)
    data = load_training(tiny_config().data)
    stored(data.train).images[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="training images changed since") as caught:
        train(tiny_config(), tmp_path / "out", device=CPU, resume=True, data=data)
    one_line(caught)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"\xff" * 100,
        lambda data: (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_damaged_state_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    run = stopped_run(tmp_path / "out", monkeypatch)
    state = run.path / "state.safetensors"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(UserError, match=r"state\.safetensors is damaged") as caught:
        train(tiny_config(), run.path, device=CPU, resume=True)
    one_line(caught)


def test_a_state_of_another_version_or_other_members_is_one_line(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "out", tiny_config(), resume=False)
    run.save_state(0, 1, members_tensors(tiny_members(1)))
    with pytest.raises(UserError, match="the saved weights do not fit member 0") as caught:
        train(tiny_config(), run.path, device=CPU, resume=True)
    one_line(caught)


@pytest.mark.parametrize("which", ["members", "standard"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_members_are_one_line_naming_the_file(copy: Path, which: str, damage: str) -> None:
    path = copy / f"{which}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[:-7] if damage == "cut" else data)
    with pytest.raises(UserError, match=f"{which}.safetensors") as caught:
        Run.open_finished(copy).members(which)
    one_line(caught)


def test_weights_that_do_not_fit_are_one_line() -> None:
    tensors = members_tensors(tiny_members(2))
    with pytest.raises(UserError, match="member 0") as caught:
        load_members(tiny_members(2, width=3), tensors)
    one_line(caught)
    with pytest.raises(UserError, match="member 2") as caught:
        load_members(tiny_members(3), tensors)
    one_line(caught)
    others = tiny_members(2)
    others[1].mean.zero_()
    load_members(others, tensors)
    assert torch.equal(others[1].mean, tiny_members(2)[1].mean)
    others[1].eval()
    assert others[1](tiny_images(1)).shape == (1, 4)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"nothing"])
def test_a_damaged_probe_is_one_line(copy: Path, content: bytes) -> None:
    (copy / "probe.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"probe\.npz") as caught:
        Run(copy).probe()
    one_line(caught)


@pytest.mark.parametrize("name", ["config.json", "checkpoint.json"])
def test_damaged_json_is_one_line_naming_the_file(copy: Path, name: str) -> None:
    (copy / name).write_text('{"half":')
    with pytest.raises(UserError, match=name) as caught:
        Run.open_finished(copy).members()
    one_line(caught)


def test_only_a_finished_run_can_be_opened(copy: Path, tmp_path: Path) -> None:
    assert Run.open_finished(copy).labels == tuple("0123456789")
    with pytest.raises(UserError, match="no run at"):
        Run.open_finished(tmp_path / "nowhere")
    (copy / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"is not finished.*--resume --out") as caught:
        Run.open_finished(copy)
    one_line(caught)


def test_a_run_of_a_newer_version_is_refused(copy: Path) -> None:
    table = json.loads((copy / "checkpoint.json").read_text())
    (copy / "checkpoint.json").write_text(json.dumps(table | {"schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2; expected version 1") as caught:
        Run.open_finished(copy)
    one_line(caught)


def test_latest_names_the_newest_run_from_its_start(finished: Path, tmp_path: Path) -> None:
    latest = finished.parent / "latest"
    assert latest.resolve() == finished.resolve()
    runs = tmp_path / "runs"
    for name in ("first", "second"):
        Run.begin(runs / name, tiny_config(), resume=False)
        assert (runs / "latest").resolve() == (runs / name).resolve()
    Run.begin(runs / "first", tiny_config(), resume=True)
    assert (runs / "latest").resolve() == (runs / "first").resolve()
    Run.begin(tmp_path / "elsewhere" / "third", tiny_config(), resume=False)
    assert not (tmp_path / "elsewhere" / "latest").exists()


def test_latest_is_a_text_file_where_links_fail(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    Run.begin(runs / "one", tiny_config(), resume=True)
    assert not (runs / "latest").is_symlink()
    assert (runs / "latest").read_text() == "one"
    assert Run.open_finished(runs / "latest").weights_sha256 == Run(finished).weights_sha256
    Run.begin(runs / "latest", tiny_config(), resume=True)
    assert (runs / "latest").read_text() == "one"


def test_resuming_latest_by_its_name_keeps_the_link_whole(finished: Path, tmp_path: Path) -> None:
    """`--resume --out runs/latest` once turned the link into one to itself."""
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True))
    run = train(tiny_config(), runs / "latest", device=CPU, resume=True)
    assert run.path == runs / "one" == follow(runs / "latest")
    assert (runs / "latest").readlink() == Path("one")
    assert Run.open_finished(runs / "latest").path == runs / "one"


def test_a_file_given_as_a_run_is_no_run(finished: Path) -> None:
    with pytest.raises(UserError, match="no run at") as caught:
        Run.open_finished(finished / "members.safetensors")
    one_line(caught)


def no_space(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_training_in_one_line_and_leaves_the_run_to_go_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", no_space)
        with pytest.raises(UserError, match=r"no space left .*config\.json") as caught:
            train(tiny_config(), tmp_path / "out", device=CPU)
        one_line(caught)
    real = Path.open

    def no_room_for_metrics(self: Path, *args: Any, **more: Any) -> Any:
        return no_space() if self.name == "metrics.jsonl" else real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_room_for_metrics)
        with pytest.raises(UserError, match=r"no space left .*metrics\.jsonl") as caught:
            train(tiny_config(), tmp_path / "out", device=CPU, resume=True)
        one_line(caught)
    run = train(tiny_config(), tmp_path / "out", device=CPU, resume=True)
    assert run.weights_sha256 == Run(finished).weights_sha256


def test_a_disk_that_is_truly_full_keeps_the_last_good_state(tmp_path: Path) -> None:
    """Without root, on a file system of the test's own: members of stage two find no room."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small disk with")
    script = ["unshare", "-rm", sys.executable, "-m", "tests.training.full_disk", str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(script, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode in (1, 77) and not done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    error, left, weights = [json.loads(line) for line in done.stdout.splitlines()]
    assert error["exit_code"] == 2
    found = re.search(
        r"members\.safetensors \(([\d,]+) bytes, ([\d,]+) free: ([\d,]+) missing\)", error["said"]
    )
    assert found is not None, error
    size, free, missing = (int(figure.replace(",", "")) for figure in found.groups())
    assert size - free == missing > 0
    assert "\n" not in error["said"]
    assert left["stage"] == 1  # the state between the stages
    assert "members.safetensors" not in left["files"]
    assert not [name for name in left["files"] if name.startswith(".")]
    whole = train(tiny_config(width=full_disk.WIDTH), tmp_path / "whole", device=CPU)
    assert weights == whole.weights_sha256


def test_what_a_kill_left_behind_is_swept_away(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.json.x1.part").write_text("{")  # killed while writing the very first file
    assert train(tiny_config(), out, device=CPU).weights_sha256 == Run(finished).weights_sha256
    assert not list(out.glob(".*"))
