"""Files that are no classifier of images, each refused with a sentence of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dverge_serve.cli import run
from dverge_serve.errors import UserError
from tests.verification.colours import THEIRS, save
from verification.contract import Contract
from verification.foreign_file import open_foreign


def graph(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(save(path))
    change(model.graph)
    onnx.save(model, path)
    return path


def inputs(count: int) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for at in range(count - 1):
            extra = helper.make_tensor_value_info(f"other{at}", TensorProto.FLOAT, [1])
            found.input.append(extra)

    return change


def shaped(kind: int, *sides: int | str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.input[0].CopyFrom(helper.make_tensor_value_info("pixels", kind, ["n", *sides]))

    return change


def sequence(found: Any) -> None:
    found.node.append(helper.make_node("SequenceConstruct", ["answer"], ["list"]))
    found.output[0].CopyFrom(
        helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)
    )


def whole(found: Any) -> None:
    """The image itself as the output."""
    found.output[0].CopyFrom(helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", 3, 8, 8]))


def missing_weights(path: Path) -> Path:
    model = onnx.load(save(path))
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=80)
    path.with_name("w.bin").unlink()
    return path


def elsewhere(path: Path) -> Path:
    model = onnx.load(save(path))
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=80)
    text = path.read_bytes().replace(b"w.bin", b"../.b")
    path.write_bytes(text)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


WRONG: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path, "no file .*model.onnx; expected an ONNX file; look at the path"),
    (lambda path: path.parent, "is a folder; expected an ONNX file; give the file itself"),
    (lambda path: save(path).parent, "is a folder; expected an ONNX file; give .*model.onnx"),
    (lambda path: text(path, b""), r"not an ONNX file, or not a whole one \(no graph in it\)"),
    (lambda path: text(path, b"hello world"), r"not an ONNX file.*\(DecodeError\)"),
    (lambda path: text(path, save(path).read_bytes()[:99]), "not a whole one.*export it again"),
    (missing_weights, "weights in w.bin, which is not in .*; expected both in one folder; put"),
    (elsewhere, r"weights in \.\./\.b; expected files beside it"),
    (lambda path: save(path, ir=99), r"IR version 99; expected \d+ or older.*upgrade onnxrunt"),
    (lambda path: save(path, opset=99), r"opset 99 of ai.onnx; expected \d+ or older.*upgrade"),
    (lambda path: save(path, operator="Nope"), "operator com.microsoft.*Nope, which ONNX Runtime"),
    (lambda path: graph(path, inputs(3)), r"takes 3 inputs \(pixels, other0, other1\); .* one"),
    (lambda path: graph(path, shaped(1, 3, 64)), r"takes tensor\(float\) \['n', 3, 64\]"),
    (lambda path: graph(path, shaped(1, 3, "h", "w")), r"shape \[3, 'h', 'w'\].*size fixed"),
    (lambda path: graph(path, shaped(1, 5, 8, 8)), "1 or 3 channels"),
    (lambda path: graph(path, sequence), "gives sequences: list seq.*export it without ZipMap"),
    (lambda path: graph(path, whole), r"gives no scores: x0 float32 \[1, 3, 8, 8\]; expected sc"),
    (lambda path: save(path, batch=1, shape=(2,)), "fails on an image of its own input shape"),
]


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_each_has_its_own_sentence(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        open_foreign(make(tmp_path / "model.onnx"))


def test_layout_and_output_are_what_was_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"which is nchw; expected `layout` nhwc"):
        open_foreign(path, layout="nhwc")
    with pytest.raises(UserError, match=r"gives no scores: .*; expected integer labels"):
        open_foreign(path, labels_alone=True)


def test_scores_are_taken_before_labels(tmp_path: Path) -> None:
    """As scikit-learn's converters write both, the labels first."""
    model = onnx.load(save(tmp_path / "model.onnx"))
    model.graph.node.append(helper.make_node("ArgMax", ["answer"], ["label"], axis=1, keepdims=0))
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])
    model.graph.output.insert(0, label)
    onnx.save(model, tmp_path / "model.onnx")
    found = open_foreign(tmp_path / "model.onnx")
    assert (found.output, found.classes) == ("answer", 6)
    found = open_foreign(tmp_path / "model.onnx", labels_alone=True)
    assert (found.output, found.classes) == ("label", 0)
    assert found.run(np.zeros((2, 3, 8, 8))).shape == (2,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--foreign"], "--foreign and --labels go together"),
        (["--labels", "names.txt"], "--foreign and --labels go together"),
        (["--foreign=maybe", "--labels", "names.txt"], "--foreign maybe; expected given or auto"),
        (["--layout", "nhwc"], "--layout without --foreign"),
        (["--mean", "a", "--foreign", "--labels", "names.txt"], "--mean a; expected 1 or 3 n"),
        (["--labels", "names.txt", "--foreign"], "without --data"),
        (
            ["--foreign", "auto", "--labels", "names.txt", "--data", "d", "--std", "0,1,1"],
            "--std 0,1,1; expected numbers above 0",
        ),
        (
            ["--foreign", "--labels", "names.txt", "--data", "d", "--pixel-max", "9"],
            "--pixel-max 9; expected 1 or 255",
        ),
        (
            ["--foreign", "auto", "--labels", "names.txt", "--data", "digits", "--layout", "nhwc"],
            "which is nchw; expected --layout nhwc",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model.onnx", Contract())
    Path("names.txt").write_text("\n".join(THEIRS))
    assert run(["verify-robustness", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("model.report.json").exists()
