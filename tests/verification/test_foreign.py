"""Foreign classifiers: every contract gives the same answers, is found, and carries gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from tests.verification.colours import (
    NAMES,
    POINTS,
    SHARP,
    SIDE,
    THEIRS,
    logits,
    save,
    training_data,
)
from verification.contract import LEAST_PROBABILITY, OTHERS, Contract
from verification.foreign_model import ForeignEngine, open_engine
from verification.foreign_network import ForeignNetwork, find_foreign_gradients

CPU = torch.device("cpu")
DATA = training_data()
IMAGES = to_float(DATA.holdout.images.numpy())
ORDER = [THEIRS.index(name) for name in NAMES]
CONTRACTS: list[Any] = [
    Contract(),
    Contract(layout="nhwc"),
    Contract(pixel_max=255),
    Contract(channels="bgr"),
    Contract(outputs="softmax"),
    Contract(mean=(0.5,), std=(0.5,)),
    Contract(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    Contract(layout="nhwc", pixel_max=255, channels="bgr", mean=(103.53, 116.28, 123.675)),
    Contract(layout="nhwc", pixel_max=255, outputs="softmax"),
    Contract(outputs="labels"),
]


@pytest.fixture(autouse=True)
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is named in these tests; what they read is `DATA`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours").mkdir()


def opened(path: Path, given: dict[str, Any] | None = None, *, search: bool = False) -> Any:
    return open_engine(path, THEIRS, "colours", given or {}).settled(
        DATA, given or {}, search=search
    )


def network(engine: ForeignEngine) -> ForeignNetwork:
    found, why = find_foreign_gradients(engine, CPU)
    assert found is not None, why
    (member,) = found.members
    assert isinstance(member, ForeignNetwork)
    return member


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_a_contract_is_found_and_stands_between_images_and_model(
    contract: Contract, tmp_path: Path
) -> None:
    engine = opened(save(tmp_path / "model.onnx", contract), search=True)
    assert engine.contract == replace(contract, order=tuple(ORDER))
    assert engine.card.labels == NAMES
    scores, expected = engine.run_all(IMAGES), logits(IMAGES)[:, ORDER]
    np.testing.assert_array_equal(scores.predictions, DATA.holdout.labels)
    if contract.outputs == "logits":
        np.testing.assert_allclose(scores.logits, expected, rtol=1e-3, atol=1e-3)
    if contract.outputs == "softmax":
        np.testing.assert_allclose(scores.probabilities, engine.run_all(IMAGES).probabilities)
        np.testing.assert_allclose(
            scores.logits - scores.logits.max(1, keepdims=True),
            expected - expected.max(1, keepdims=True),
            atol=1e-3,
        )
    if contract.outputs == "labels":
        assert set(np.unique(scores.logits)) == {np.float32(OTHERS), np.float32(0)}
        assert find_foreign_gradients(engine, CPU) == (None, "the model gives labels alone")


@pytest.mark.parametrize("contract", CONTRACTS[:-1], ids=str)
def test_gradients_pass_through_the_contract(contract: Contract, tmp_path: Path) -> None:
    engine = opened(save(tmp_path / "model.onnx", contract), search=True)
    member = network(engine)
    x = torch.from_numpy(IMAGES).requires_grad_(True)
    found = member(x)
    np.testing.assert_allclose(
        found.detach().numpy(), engine.run_all(IMAGES).logits, rtol=1e-4, atol=1e-3
    )
    (found[:, 1] - found[:, 0]).sum().backward()
    # By hand: twice the colours' difference, spread over the pixels, in units of the image.
    points = np.array([THEIRS.index(NAMES[0]), THEIRS.index(NAMES[1])])
    one = IMAGES[:1].copy()
    up = one.copy()
    up[:, 0] += 0.25
    slope = np.diff((logits(up) - logits(one))[0, points])[0] / 0.25 / SIDE**2
    assert x.grad is not None
    np.testing.assert_allclose(x.grad[:, 0].numpy(), slope, rtol=1e-3)


def test_what_is_given_is_not_searched(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", Contract(pixel_max=255))
    plain = opened(path)
    assert plain.contract.pixel_max == 1  # nothing was tried, nothing refused
    assert plain.found.tried[0][1] < len(IMAGES)
    told = opened(path, {"pixel_max": 255})
    assert told.found.tried == [(told.contract, len(IMAGES))]
    found = opened(path, {"mean": (0.0,)}, search=True)
    assert found.contract.pixel_max == 255
    assert len(found.found.tried) == 4  # two ranges, two orders of channels
    assert {each.mean for each, _ in found.found.tried} == {(0.0,)}


def test_what_is_given_must_fit_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"gives scores that are no probabilities; exp.* logits"):
        opened(path, {"outputs": "softmax"})
    labels = save(tmp_path / "labels.onnx", Contract(outputs="labels"))
    with pytest.raises(UserError, match="gives labels alone; expected `outputs` logits, as asked"):
        opened(labels, {"outputs": "logits"})
    grey = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
            helper.make_node("Tile", ["mean", "six"], ["y"]),
        ],
        "grey",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 1, 1])],
        [numpy_helper.from_array(np.array([1, 6, 1, 1]), "six")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(grey, ir_version=10, opset_imports=opset), path)
    with pytest.raises(UserError, match="`std` 1,1,2 for 1 channels; expected one number"):
        opened(path, {"std": (1, 1, 2)})


def test_contracts_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    """By the angle between colours 0..1 and 0..255 are the same."""
    model = onnx.load(save(tmp_path / "model.onnx"))
    angles = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    for tensor in model.graph.initializer:
        if tensor.name in ("weights", "bias"):
            value = np.ascontiguousarray(angles.T) if tensor.name == "weights" else 0 * POINTS[:, 0]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    engine = opened(tmp_path / "model.onnx", {"mean": (0.0,)}, search=True)
    assert engine.contract.pixel_max == 1  # of equals the plainest
    assert any(each.pixel_max == 255 for each in engine.found.alike)
    assert "NOT told apart from: NCHW, 0..255, RGB, logits" in str(engine.found)


def test_a_contract_no_better_than_guessing_is_refused(tmp_path: Path) -> None:
    engine = open_engine(save(tmp_path / "m.onnx", sharp=0.0), THEIRS, "colours", {})
    with pytest.raises(UserError, match=r"may be guessing.*order of the names in `labels`"):
        engine.settled(DATA, {}, search=True)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="only the data has the class 'brick'"):
        open_engine(path, ("clay", *THEIRS[:3], *THEIRS[4:]), "colours", {}).settled(
            DATA, {}, search=False
        )
    with pytest.raises(UserError, match="gives 6 scores; expected 2, one a label"):
        open_engine(path, ("a", "b"), "colours", {})
    labels = save(tmp_path / "labels.onnx", Contract(outputs="labels"))
    few = open_engine(labels, THEIRS[:2], "colours", {})
    with pytest.raises(UserError, match=r"the model answers class .; expected 0 to 1"):
        few.run_all(IMAGES)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_fixed_batch_and_scores_of_four_dimensions(
    batch: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    engine = opened(save(tmp_path / "model.onnx", batch=batch, shape=shape))
    expected = logits(IMAGES)[:, ORDER]
    np.testing.assert_allclose(engine.run_all(IMAGES[:7]).logits, expected[:7], atol=1e-3)
    if batch == 1:
        member = network(engine)
        assert member.one_by_one  # the batch is written into its Reshape
        np.testing.assert_allclose(
            member(torch.from_numpy(IMAGES[:7])).numpy(), expected[:7], atol=1e-3
        )


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_inputs_of_other_types(kind: int, tmp_path: Path) -> None:
    white = 255 if kind == TensorProto.UINT8 else 1
    path = save(tmp_path / "model.onnx", Contract(pixel_max=white), dtype=kind)
    engine = opened(path, search=True)
    assert engine.contract.pixel_max == white
    np.testing.assert_array_equal(engine.run_all(IMAGES).predictions, DATA.holdout.labels)
    gradients, why = find_foreign_gradients(engine, CPU)
    assert gradients is None
    assert "gradients need float32" in why


def test_a_softmax_that_is_certain_hides_no_gradient(tmp_path: Path) -> None:
    """Its probabilities are exactly 0 and 1: their log is cut off, the gradient is not."""
    certain = save(tmp_path / "model.onnx", Contract(outputs="softmax"), sharp=100 * SHARP)
    engine = opened(certain)
    member, scores = network(engine), engine.run_all(IMAGES)
    assert scores.logits.min() == pytest.approx(np.log(LEAST_PROBABILITY))
    x = torch.from_numpy(IMAGES).requires_grad_(True)
    found = member(x)
    np.testing.assert_allclose(found.detach().numpy(), scores.logits, atol=2e-2)
    (found[:, 1] - found[:, 0]).sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs().amax((1, 2, 3)) > 0).all())


def test_an_operator_that_torch_cannot_have_leaves_black_box_attacks(tmp_path: Path) -> None:
    engine = opened(save(tmp_path / "model.onnx", operator="QuickGelu"))
    gradients, why = find_foreign_gradients(engine, CPU)
    assert gradients is None
    assert "onnx2torch cannot read the file" in why
    assert "QuickGelu" in why


def test_the_contract_and_outside_weights_are_part_of_what_is_attacked(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.onnx")
    engine = opened(plain)
    assert opened(plain, {"channels": "bgr"}).card.weights_sha256 != engine.card.weights_sha256
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(plain), path, save_as_external_data=True, location="w", size_threshold=80)
    engine = opened(path)
    np.testing.assert_allclose(engine.run_all(IMAGES).logits, opened(plain).run_all(IMAGES).logits)
    np.testing.assert_allclose(
        network(engine)(torch.from_numpy(IMAGES)).numpy(), engine.run_all(IMAGES).logits, atol=1e-3
    )
    weights = bytearray((tmp_path / "w").read_bytes())
    weights[0] ^= 1  # the smallest change that there is
    (tmp_path / "w").write_bytes(weights)
    changed = opened(path)
    assert changed.sha256 == engine.sha256
    assert changed.card.weights_sha256 != engine.card.weights_sha256


def test_a_contract_survives_its_report_and_refuses_nonsense() -> None:
    contract = replace(CONTRACTS[7], order=(1, 0))
    assert Contract.from_json(contract.to_json()) == contract
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"layout": "chw"}, "`layout` chw; expected nchw or nhwc"),
        ({"channels": "grey"}, "`channels` grey; expected rgb or bgr"),
        ({"outputs": "scores"}, "`outputs` scores; expected logits, softmax or labels"),
        ({"pixel_max": 256}, "`pixel_max` 256; expected 1 or 255"),
        ({"mean": (0.5, 0.5)}, "`mean` 0.5,0.5; expected 1 or 3 numbers"),
        ({"std": (float("nan"),)}, "`std` nan"),
        ({"range": 1}, "`contract` with 'range'; expected layout, pixel_max, mean, std, channels"),
        ({"order": (0, 1)}, "`contract` with 'order'"),
        ({"std": (0.0,)}, "`std` 0; expected numbers above 0"),
    ]
    for given, words in wrong:
        with pytest.raises(UserError, match=words):
            Contract.checked(given)
