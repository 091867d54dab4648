"""Lists of safetensors members: read together, refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dverge_serve.cli import run
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export.exporter import export
from export.member_list import from_list
from export.parity import torch_scores
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages

LIST = """
labels = ["cat", "dog", "owl"]
mean = [0.4]
std = [0.3]
[image]
mode = "L"
crop = [10, 12]
[[member]]
file = "a.safetensors"
architecture = "resnet8"
width = 4
[[member]]
file = "b.safetensors"
architecture = "resnet14"
width = 3
"""


@pytest.fixture
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Member]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made = [
        Member(resnet_stages(f"resnet{depth}", 1, width, 3), [0.4], [0.3]).eval()
        for depth, width in ((8, 4), (14, 3))
    ]
    save_file(made[0].state_dict(), "a.safetensors")
    # As `dverge train` names them; the normalisation may be left to the list.
    tensors = {f"member0.{name}": tensor for name, tensor in made[1].state_dict().items()}
    save_file(
        {k: v for k, v in tensors.items() if not k.endswith((".mean", ".std"))}, "b.safetensors"
    )
    first = made[0].state_dict().items()
    save_file({f"member{k}.{n}": t.clone() for k in (0, 1) for n, t in first}, "run.safetensors")
    Path("list.toml").write_text(LIST)
    return made


def test_members_of_different_architectures_become_one_file(members: list[Member]) -> None:
    export(from_list("list.toml"), Path("m.onnx"))
    engine = Engine(Path("m.onnx"), device="cpu")
    assert (engine.card.labels, engine.card.members) == (("cat", "dog", "owl"), 2)
    assert (engine.card.source, engine.card.probe) == ("member-list", "synthetic")
    images = np.random.default_rng(0).random((3, 1, 10, 12), dtype=np.float32)
    expected = torch_scores(Ensemble(members), torch.from_numpy(images))
    np.testing.assert_allclose(engine.run(images).logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"a.safetensors"', '"none.safetensors"', "cannot read none.safetensors"),
        ('"a.safetensors"', '"list.toml"', "list.toml is damaged"),
        ('"a.safetensors"', '"run.safetensors"', "holds several members"),
        ("resnet8", "resnet14", "that a resnet14 has not, first 'stages.4.shortcut"),
        ("width = 4", "widht = 4", "did you mean 'width'"),
        ("labels = ", "names = ", "unknown key 'names'"),
        ('["cat", "dog", "owl"]', '["cat", "cat"]', "comes twice"),
        ('["cat", "dog", "owl"]', "3", "labels = 3"),
        ("mean = [0.4]", "", "has no 'mean'"),
        ("mean = [0.4]", "mean = [0.4, 0.5]", "data.mean"),
        ("[[member]]", "[[other]]", "unknown key 'other'"),
        ("crop = [10, 12]", "crop = [10", "a TOML list of members"),
    ],
)
def test_mistakes_are_one_line(old: str, new: str, words: str, members: list[Member]) -> None:
    Path("list.toml").write_text(LIST.replace(old, new, 1 if old != "[[member]]" else 2))
    with pytest.raises(UserError) as caught:
        from_list(Path("list.toml"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_takes_a_list(
    members: list[Member], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "m.onnx", "--checkpoint", "list.toml"]) == 0
    assert "one branch for each member" in capsys.readouterr().out
    assert run(["export", "n.onnx", "--checkpoint", "list.toml", "--labels", "cifar10"]) == 2
    assert run(["export", "n.onnx", "--checkpoint", "nowhere.toml"]) == 2
    assert not Path("n.onnx").exists()
