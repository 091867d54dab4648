"""Checkpoints of the published code: read as they are, refused in one line where they are not."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from dverge_serve.cli import run
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess, load, to_float
from export.exporter import export
from export.parity import torch_scores
from export.published_checkpoint import CIFAR10, from_checkpoint, read_published
from tests.training.published import Table, nets, table
from training.models.build import build_members
from training.models.ensemble import Ensemble

# On 200 images of the JPEG copy, which costs networks that were trained without a defence more.
PUBLISHED = [
    ("official_dverge_3xresnet20_eps0.07.pth", "resnet20", "dverge", 0.92),
    ("official_baseline_3xresnet20.pth", "resnet20", "standard", 0.84),
    ("akamaster_resnet20-12fca82f.th", "resnet20-pad", "standard", 0.79),
]


@pytest.mark.parametrize(
    ("count", "blocks", "bottleneck", "key"),
    [
        (1, 1, False, "model"),
        (3, 1, False, "model_"),
        (2, 2, False, "model"),
        (2, 1, True, "model"),
    ],
)
def test_the_file_says_what_the_published_network_says(
    count: int, blocks: int, bottleneck: bool, key: str, tmp_path: Path
) -> None:
    made = nets(count, bottleneck=bottleneck, blocks=blocks)
    torch.save(table(made, key), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    source = from_checkpoint(str(tmp_path / "c.pth"), "cifar10")
    named = f"resnet{9 * blocks + 2}-bottleneck" if bottleneck else f"resnet{6 * blocks + 2}"
    assert source.config.architecture == named
    (again, *_) = build_members(source.config, 10, [0.3] * 3, [0.5] * 3)  # as surrogates are
    shapes = [tuple(tensor.shape) for tensor in again.state_dict().values()]
    assert shapes == [tuple(tensor.shape) for tensor in source.ensemble[0].state_dict().values()]
    form = "grouped" if count > 1 else "branches"
    export(source, tmp_path / "m.onnx", form=form)  # type: ignore[arg-type]
    engine = Engine(tmp_path / "m.onnx", device="cpu")
    images = torch.rand(5, 3, 32, 32)
    expected = torch.stack([net((images - 0.3) / 0.5) for net in made], 1)
    found = engine.run(images.numpy())
    torch.testing.assert_close(
        torch.from_numpy(found.member_logits), expected.detach(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.from_numpy(found.logits), expected.mean(1).detach(), atol=1e-4, rtol=1e-4
    )
    assert engine.card.labels == CIFAR10
    assert engine.card.probe == "synthetic"
    assert engine.card.source == "published-checkpoint"


def test_shortcuts_by_padding_are_exported_as_branches(tmp_path: Path) -> None:
    made = nets(2, pad=True)
    torch.save(table(made), tmp_path / "c.pth")
    export(from_checkpoint(tmp_path / "c.pth", "cifar10"), tmp_path / "m.onnx")
    engine = Engine(tmp_path / "m.onnx", device="cpu")
    images = torch.rand(3, 3, 32, 32)
    expected = torch.stack([net((images - 0.3) / 0.5) for net in made], 1).detach()
    found = torch.from_numpy(engine.run(images.numpy()).member_logits)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert engine.card.form == "branches"
    assert engine.card.training["architecture"] == "resnet8-pad"


def test_normalisation_the_file_does_not_carry_is_the_published_one(tmp_path: Path) -> None:
    plain = {"model0": nets(1)[0].state_dict()}  # no wrapper: no "model." and no normaliser
    torch.save(plain, tmp_path / "c.pth")
    assert read_published(tmp_path / "c.pth").resnet.mean == (0.4914, 0.4822, 0.4465)


def without(name: str) -> Callable[[Table], object]:
    return lambda made: made["model0"].pop(name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: made.pop("model0"), "holds model1, model2"),
        (lambda made: made.update(model1={}), "0 tensors"),
        (without("model.fc.weight"), "a CIFAR ResNet"),
        (
            without("model.layer2.0.bn1.bias"),
            "lacks 1 of the 47 tensors of model0, first 'layer2.0.bn1.bias'",
        ),
        (
            lambda made: made["model0"].update({"model.extra": torch.zeros(1)}),
            "1 tensors that model0 has not, first 'extra'",
        ),
        (lambda made: made["model0"].update({"model.fc.bias": torch.zeros(3)}), "'fc.bias' in"),
        (lambda made: made["model0"]["model.bn1.weight"].fill_(torch.nan), "not finite"),
        (lambda made: made["model0"]["model.bn1.running_var"].fill_(-1), "has negative values"),
        (lambda made: made.update({"model_0": made["model0"]}), "holds model0 and model_0"),
        (
            lambda made: made["model0"].update({"model.fc.bias": torch.zeros(10).to_sparse()}),
            "'fc.bias' in",
        ),
        (
            lambda made: made["model0"].update({"model.fc.bias": torch.zeros(10) * 1j}),
            "complex64; expected an ordinary tensor",
        ),
        (lambda made: made["model0"]["normalizer.std"].fill_(torch.nan), "std above 0"),
        (lambda made: made["model0"]["normalizer.std"].fill_(0), "std above 0"),
        (lambda made: made["model0"]["normalizer.mean"].fill_(torch.inf), "expected finite"),
        (lambda made: made["model0"].update({"model.fc.bias": "text"}), "is a str"),
    ],
)
def test_a_partial_checkpoint_is_refused_in_one_line(
    spoil: Callable[[Table], object], words: str, tmp_path: Path
) -> None:
    made = table(nets(3))
    spoil(made)
    torch.save(made, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"expected") as caught:
        from_checkpoint(tmp_path / "c.pth", "cifar10")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_read_from_a_file(tmp_path: Path) -> None:
    torch.save(table(nets(1)), tmp_path / "c.pth")
    (tmp_path / "names").write_text("\ufeff" + "\n".join("abcdefghij"))  # as Windows writes it
    source = from_checkpoint(tmp_path / "c.pth", tmp_path / "names")
    assert source.card.labels == tuple("abcdefghij")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_foreign_files_and_code_in_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("not a checkpoint")
    Path("empty.pth").write_bytes(b"")
    Path("evil.pth").write_bytes(pickle.dumps({"model0": Evil()}))
    torch.save([1, 2], "list.pth")
    torch.save({"model0": nn.Linear(2, 2)}, "module.pth")
    torch.save(table(nets(1)), "good.pth")
    Path("half.pth").write_bytes(Path("good.pth").read_bytes()[:2000])
    Path("names").write_text("a\nb\n")
    for arguments, words in (
        (["--checkpoint", "none.pth", "--labels", "cifar10"], "cannot read none.pth"),
        (["--checkpoint", "text.pth", "--labels", "cifar10"], "text.pth is no weights file"),
        (["--checkpoint", "empty.pth", "--labels", "cifar10"], "is no weights file"),
        (["--checkpoint", "evil.pth", "--labels", "cifar10"], "is damaged, or not of"),
        (["--checkpoint", "half.pth", "--labels", "cifar10"], "is damaged"),
        (["--checkpoint", "module.pth", "--labels", "cifar10"], "torch.nn.modules.linear.Linear"),
        (["--checkpoint", "list.pth", "--labels", "cifar10"], "holds a list"),
        (["--checkpoint", "good.pth", "--labels", "names"], "2 different classes"),
        (["--checkpoint", "good.pth", "--labels", "nowhere"], "cannot read labels"),
        (["--checkpoint", "good.pth"], "without --labels"),
        (["--labels", "cifar10"], "without --checkpoint"),
        (["--checkpoint", "good.pth", "--run", "x"], "one of the two"),
    ):
        assert run(["export", "m.onnx", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert not Path("evil").exists()
    assert not Path("m.onnx").exists()


@pytest.fixture(scope="module")
def real_images(test_data: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Twenty test images of every class of CIFAR-10, from its JPEG copy."""
    archive, each = test_data / "cifar10-jpeg.tar.xz", 20
    if not archive.is_file():
        pytest.skip(f"no {archive.name} in {test_data}")
    preprocess = Preprocess(mode="RGB", resize=(32, 32), crop=(32, 32))
    pixels: dict[str, list[Any]] = {name: [] for name in CIFAR10}
    with tarfile.open(archive) as tar:
        for item in tar:
            parts = Path(item.name).parts
            if item.isfile() and "test" in parts and len(pixels[parts[-2]]) < each:
                pixels[parts[-2]].append(load(tar.extractfile(item).read(), preprocess))  # type: ignore[union-attr]
            if all(len(found) == each for found in pixels.values()):
                break
    images = np.stack([image for found in pixels.values() for image in found])
    return images, np.repeat(np.arange(10), each)


@pytest.mark.parametrize(("name", "architecture", "method", "accuracy"), PUBLISHED)
def test_published_files_on_real_images(
    name: str,
    architecture: str,
    method: str,
    accuracy: float,
    test_data: Path,
    real_images: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    tmp_path: Path,
) -> None:
    file = test_data / name
    if not file.is_file():
        pytest.skip(f"no {file.name} in {test_data}")
    found = read_published(file)
    resnet = found.resnet
    assert (resnet.architecture, resnet.width, resnet.classes) == (architecture, 16, 10)
    assert found.method == method
    assert len(found.members) == (1 if architecture.endswith("-pad") else 3)
    pixels, labels = real_images
    export(from_checkpoint(file, "cifar10"), tmp_path / "m.onnx", form="branches")
    images = to_float(pixels)
    answers = Engine(tmp_path / "m.onnx", device="cpu").run_all(images).predictions
    expected = torch_scores(Ensemble(found.members), torch.from_numpy(images)).predictions
    assert (answers == expected).mean() >= 0.99
    assert (answers == labels).mean() == pytest.approx(accuracy, abs=0.06)
