"""What damage to a run's files says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config, tiny_images, tiny_members
from tests.training.refusal import one_line
from tests.training.stopping import stopped_run
from training.models.state_dict import load_members, members_tensors
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")


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
    with pytest.raises(UserError, match=r"in the saved state has shape .*, in member 0") as caught:
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
    again = "the saved state .* member 0.*; train into another `out`"
    with pytest.raises(UserError, match=again) as caught:
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
