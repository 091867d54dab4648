"""Starting weights from files: what they stand for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import models

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from dverge_serve.progress import Progress
from tests.training.networks import tiny_config
from training.config import Config
from training.models.build import build_members
from training.models.member import Member
from training.models.pretrained import Start
from training.models.torchvision_member import build_torchvision
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two members."""
    out = tmp_path_factory.mktemp("start") / "earlier"
    return train(tiny_config(seed=7), out, device=CPU).path


def single(earlier: Path, path: Path) -> Path:
    """Write the first member's tensors alone, as any program would."""
    tensors = load_file(earlier / "standard.safetensors")
    found = {
        name.removeprefix("member0."): t
        for name, t in tensors.items()
        if name.startswith("member0.")
    }
    save_file(found, path)
    return path


def members_of(config: Config, classes: int = 10) -> list[Member]:
    channels = config.data.preprocess.shape[0]
    return build_members(config, classes, [0.5] * channels, [0.5] * channels)


def started(config: Config, classes: int = 10) -> tuple[Start, list[Member]]:
    start, members = Start.read(config), members_of(config, classes)
    assert start is not None
    start.put_into(members)
    return start, members


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_members_of_a_run_stand_for_standard_training(
    earlier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    file = earlier / "standard.safetensors"
    run = train(tiny_config(seed=7, start=str(file)), tmp_path / "run", device=CPU)
    assert {line["stage"] for line in lines(run)} == {"dverge"}
    assert (run.path / "standard.safetensors").read_bytes() == file.read_bytes()
    # The same seed from there on: what the whole run came to.
    assert (run.path / "members.safetensors").read_bytes() == (
        earlier / "members.safetensors"
    ).read_bytes()
    record = {"file": "standard.safetensors", "sha256": sha256(file.read_bytes())}
    assert run.checkpoint["start"] == [record]
    assert "standard training, which is skipped" in capfd.readouterr().err


def test_the_standard_method_trains_them_further(earlier: Path, tmp_path: Path) -> None:
    file = earlier / "members.safetensors"
    config = tiny_config(method="standard", start=str(file), standard__lr=1e-12)
    run = train(config, tmp_path / "run", device=CPU)
    assert len(lines(run)) == 2
    before = load_file(file)
    for name, tensor in load_file(run.path / "members.safetensors").items():
        if name.endswith("weight"):
            torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-6)


def test_a_method_with_a_stage_of_its_own_begins_from_them_again(
    earlier: Path, tmp_path: Path
) -> None:
    file = earlier / "standard.safetensors"
    more = {"adversarial__lr": 1e-12, "adversarial__epochs": 1, "adversarial__steps": 1}
    config = tiny_config(method="adversarial", start=str(file), **more)
    run = train(config, tmp_path / "run", device=CPU)
    before = load_file(file)
    weight = "member1.stages.0.conv.weight"
    found = load_file(run.path / "members.safetensors")[weight]
    torch.testing.assert_close(found, before[weight], rtol=1e-4, atol=1e-6)


def test_a_single_model_starts_all_members_but_for_their_last_layers(
    earlier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With equal last layers members would be equal, see the same batches and stay so."""
    monkeypatch.setattr(Progress, "shown", True)
    file = single(earlier, tmp_path / "one.safetensors")
    config = tiny_config(start=str(file), members=3)
    stored = load_file(file)
    start, members = started(config)
    fresh = members_of(config)
    assert not start.complete(members)
    for member, random in zip(members, fresh, strict=True):
        for name, tensor in member.state_dict().items():
            own = name.startswith("stages.7.")
            assert torch.equal(tensor, random.state_dict()[name] if own else stored[name]), name
    heads = {bytes(m.state_dict()["stages.7.linear.weight"].numpy().tobytes()) for m in members}
    assert len(heads) == 3
    run = train(config, tmp_path / "run", device=CPU)
    assert {line["stage"] for line in lines(run)} == {"standard", "dverge"}
    assert "standard training begins from one.safetensors" in capfd.readouterr().err


def test_a_list_names_files_for_each_member(earlier: Path, tmp_path: Path) -> None:
    one = single(earlier, tmp_path / "one.safetensors")
    config = tiny_config(start=[str(earlier / "standard.safetensors"), str(one)], members=3)
    start, members = started(config)
    stored = load_file(earlier / "standard.safetensors")
    for member, index in zip(members, (0, 1, 0), strict=True):
        weight = member.state_dict()["stages.3.conv.weight"]
        assert torch.equal(weight, stored[f"member{index}.stages.3.conv.weight"])
    assert start.complete(members)
    twice, members = started(tiny_config(start=[str(one), str(one)]))
    assert not twice.complete(members)
    assert len(twice.files) == 2


def test_a_last_layer_for_other_classes_is_drawn_anew(earlier: Path) -> None:
    config = tiny_config(start=str(earlier / "members.safetensors"))
    start, members = started(config, classes=4)
    assert not start.complete(members)
    assert members[0].state_dict()["stages.7.linear.weight"].shape[0] == 4
    stored = load_file(earlier / "members.safetensors")["member1.stages.6.conv.weight"]
    assert torch.equal(members[1].state_dict()["stages.6.conv.weight"], stored)


def test_a_torchvision_state_dict_starts_torchvision_members(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = models.get_model("mobilenet_v3_small", weights=None, num_classes=7)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in plain.state_dict().items()
        if not name.endswith("num_batches_tracked")  # as in files of some years ago
    }
    save_file(tensors, tmp_path / "imagenet.safetensors")
    config = Config(
        name="t", architecture="torchvision:mobilenet_v3_small", members=2,
        start=str(tmp_path / "imagenet.safetensors"),
    )  # fmt: skip
    start, members = started(config, classes=3)
    assert not start.complete(members)
    state = members[1].state_dict()
    assert torch.equal(state["network.features.0.0.weight"].half(), tensors["features.0.0.weight"])
    assert state["network.features.0.0.weight"].dtype == torch.float32
    assert state["network.classifier.3.weight"].shape[0] == 3
    assert torch.equal(
        state["network.classifier.0.weight"].half(), tensors["classifier.0.weight"]
    )  # not its last layer
    same = build_torchvision("mobilenet_v3_small", 7, [0.5] * 3, [0.5] * 3, (3, 32, 32))
    alone = Start.read(Config(name="t", method="standard", members=1, start=config.start))
    assert alone is not None
    assert alone.complete([same])


def refusal(config: Config, classes: int = 10) -> str:
    with pytest.raises(UserError) as caught:
        started(config, classes)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(earlier: Path, tmp_path: Path, change: Any) -> str:
    """Return the refusal of a run's weights after `change` of its tensors."""
    tensors = load_file(earlier / "standard.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return refusal(tiny_config(start=str(tmp_path / "changed.safetensors")))


def test_missing_files_and_folders_are_named(earlier: Path, tmp_path: Path) -> None:
    message = refusal(tiny_config(start=str(tmp_path / "gone.safetensors")))
    assert "gone.safetensors (No such file" in message
    assert "members.safetensors" in refusal(tiny_config(start=str(earlier)))


@pytest.mark.parametrize("damage", ["cut", "empty", "json", "text"])
def test_a_damaged_file_is_named(earlier: Path, tmp_path: Path, damage: str) -> None:
    content = {
        "cut": (earlier / "standard.safetensors").read_bytes()[:-50],
        "empty": b"",
        "json": b'{"weights": 3}',
        "text": b"these are not weights, whatever the name says",
    }[damage]
    (tmp_path / "bad.safetensors").write_bytes(content)
    message = refusal(tiny_config(start=str(tmp_path / "bad.safetensors")))
    told = "is damaged" if damage == "cut" else "is no weights file; expected safetensors, or"
    assert f"bad.safetensors {told}" in message


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_needs_code_is_refused_unread(tmp_path: Path, legacy: bool) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "went off",))

    torch.save(
        {"weight": Bomb()}, tmp_path / "w.safetensors", _use_new_zipfile_serialization=not legacy
    )
    message = refusal(tiny_config(start=str(tmp_path / "w.safetensors")))
    assert "holds an object of" in message
    assert "only tensors are unpickled" in message
    assert not (tmp_path / "went off").exists()


def test_parts_of_networks_are_refused(earlier: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["member1.stages.2.conv.weight"], tensors["member1.stages.7.linear.bias"]

    message = changed(earlier, tmp_path, drop)
    assert "lacks 2 of the 47 tensors of member 1, first 'stages.2.conv.weight'" in message


def test_other_networks_are_refused(earlier: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["member0.stages.8.linear.weight"] = torch.zeros(2)

    assert "holds 1 tensors that member 0 has not" in changed(earlier, tmp_path, add)
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    message = refusal(tiny_config(start=str(tmp_path / "foreign.safetensors")))
    assert "no weights of member 0 (its first tensor is 'encoder.weight')" in message
    save_file({}, tmp_path / "nothing.safetensors")
    assert "'none'" in refusal(tiny_config(start=str(tmp_path / "nothing.safetensors")))


def test_other_widths_are_refused(earlier: Path) -> None:
    message = refusal(tiny_config(start=str(earlier / "standard.safetensors"), width=3))
    assert "has shape [8, 1, 3, 3]" in message
    assert "in member 0 [3" in message


def test_numbers_that_are_not_finite_are_refused(earlier: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["member1.stages.4.norm.running_var"][1] = float("nan")

    message = changed(earlier, tmp_path, spoil)
    assert "'stages.4.norm.running_var'" in message
    assert "not finite" in message


def test_another_number_of_members_is_refused(earlier: Path) -> None:
    message = refusal(tiny_config(start=str(earlier / "standard.safetensors"), members=3))
    assert "holds 2 members, the run has 3" in message
    assert "use `members` 2" in message


def test_bad_weights_leave_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read nowhere"):
        train(tiny_config(start="nowhere.safetensors"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_starting_weights(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = single(earlier, tmp_path / "one.safetensors")
    config = tiny_config(start=str(file))

    class StoppedError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(Run, "save_members", stop)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", device=CPU)
    monkeypatch.undo()
    tensors = load_file(file)
    tensors["stages.0.conv.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="starting weights changed since"):
        train(config, tmp_path / "run", device=CPU, resume=True)
    single(earlier, file)
    assert train(config, tmp_path / "run", device=CPU, resume=True).finished
