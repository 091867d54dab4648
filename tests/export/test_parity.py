"""The file says what torch says: every architecture, both forms, any batch, any image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from dverge_serve.engine import providers as devices
from dverge_serve.engine.card import FusionMode
from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from dverge_serve.progress import Progress
from export.fusing import can_group, fuse
from export.fusion_choice import FusionPlan, build_best, rule
from export.graph import build_graph
from export.parity import check, compare, torch_scores
from tests.export.ensembles import card_of, engine_of, ensemble, lively, probe
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages


@pytest.mark.parametrize(
    ("architecture", "count", "channels", "size", "form"),
    [
        ("resnet8", 1, 1, 8, "branches"),
        ("resnet8", 2, 1, 8, "grouped"),
        ("resnet14", 3, 3, 32, "grouped"),
        ("resnet20", 3, 3, 32, "grouped"),
        ("resnet20", 3, 3, 32, "branches"),
        ("resnet8", 5, 1, 17, "grouped"),
        ("resnet8", 8, 3, 9, "grouped"),
        ("resnet8", 2, 3, 224, "grouped"),
        ("resnet11-bottleneck", 3, 3, 16, "grouped"),
        ("resnet8-leaky", 3, 3, 16, "grouped"),
        (("resnet8", "resnet14"), 2, 3, 16, "branches"),
        ("torchvision:mobilenet_v3_small", 2, 3, 224, "branches"),
        ("torchvision:resnet18", 1, 3, 64, "branches"),
    ],
)
def test_parity(
    architecture: str, count: int, channels: int, size: int, form: FusionMode, tmp_path: Path
) -> None:
    members, card = ensemble(architecture, count, channels, size)
    engine = engine_of(build_graph(members, replace(card, form=form)), tmp_path)
    assert engine.card.form == form
    found = check(engine, members, probe(card))
    assert found.holds, found
    scores = engine.run_all(to_float(probe(card)), batch=5)
    np.testing.assert_allclose(scores.member_logits.mean(1), scores.logits, rtol=1e-4, atol=1e-3)


def test_what_is_not_a_number_is_never_alike() -> None:
    sound = Scores(np.zeros((1, 2), np.float32), np.zeros((1, 3, 2), np.float32))
    assert compare(sound, sound).holds
    for logits, own in ((np.nan, 0.0), (0.0, np.nan)):
        broken = Scores(np.full((1, 2), logits, np.float32), np.full((1, 3, 2), own, np.float32))
        assert not compare(sound, broken).holds


def test_what_can_be_grouped() -> None:
    alike, _ = ensemble("resnet8", 2, 3, 8)
    other, _ = ensemble("resnet14", 2, 3, 8)
    wide, _ = ensemble("resnet8", 2, 3, 8, width=5)
    assert can_group(alike)
    assert not can_group(Ensemble([alike[0]]))
    assert not can_group(Ensemble([alike[0], other[0]]))
    assert not can_group(Ensemble([alike[0], wide[0]]))
    assert not can_group(Ensemble([alike[0], nn.Flatten()]))
    shifted = Member(resnet_stages("resnet8", 3, 4, 3), [0.5] * 3, [0.3] * 3).eval()
    assert not can_group(Ensemble([alike[0], shifted]))
    with_norm = Member(resnet_stages("resnet8", 3, 4, 3), [0.4] * 3, [0.3] * 3).eval()
    with_norm.stages[2].add_module("extra", nn.GroupNorm(2, 4))
    assert not can_group(Ensemble([with_norm, with_norm]))


def test_members_that_differ_fall_back_to_branches() -> None:
    members, card = ensemble(("resnet8", "resnet14"), 2, 3, 8)
    plan, _ = build_best(members, card, "auto", "cpu")
    assert (plan.form, plan.speedups) == ("branches", {})
    with pytest.raises(UserError, match="cannot become one grouped network"):
        build_best(members, card, "grouped", "cpu")


@pytest.mark.parametrize(
    ("architecture", "width", "target", "form"),
    [
        ("resnet8", 16, "cpu", "grouped"),
        ("resnet11-bottleneck", 16, "cpu", "grouped"),
        ("resnet8", 8, "cpu", "branches"),
        ("resnet8", 24, "cpu", "branches"),
        ("resnet8", 8, "cuda", "grouped"),
        (("resnet8", "resnet14"), 16, "cuda", "branches"),
    ],
)
def test_the_rule_takes_groups_of_whole_blocks(
    architecture: str, width: int, target: str, form: str
) -> None:
    members, _ = ensemble(architecture, 2, 1, 8, width)
    assert rule(members, target) == form


def test_by_the_rule_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("export.fusion_choice.speedups")
    members, card = ensemble("resnet8", 2, 1, 8, 16)
    plan, data = build_best(members, card, "auto", "cpu")
    assert plan == FusionPlan("grouped", "cpu")
    assert build_best(members, card, "auto", "cpu") == (plan, data)


@pytest.mark.parametrize(
    ("ratio", "form"), [(1.3, "grouped"), (0.85, "grouped"), (0.7, "branches")]
)
def test_the_choice_follows_the_measurement_with_a_margin(
    ratio: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, card = ensemble("resnet8", 2, 1, 8)
    monkeypatch.setattr("export.fusion_choice.speedups", lambda *_: {1: ratio, 32: ratio})
    plan, data = build_best(members, card, "measure", "cpu")
    assert plan.form == form
    assert data == build_graph(members, replace(card, form=plan.form, target="cpu"))


def test_a_gpu_that_does_not_work_is_replaced_only_where_none_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver and a CUDA build are here, but not the libraries: ONNX Runtime falls back."""
    members, card = ensemble("resnet8", 2, 1, 8)
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [devices.CUDA, devices.CPU])

    def measured(_: bytes, __: bytes, device: str) -> dict[int, float]:
        if device == "cuda":
            raise UserError("cuda was asked for but ONNX Runtime fell back", "", "use `device` cpu")
        return {1: 2.0}

    monkeypatch.setattr("export.fusion_choice.speedups", measured)
    monkeypatch.setattr(Progress, "shown", True)
    plan, data = build_best(members, card, "measure", "auto")
    assert (plan.form, plan.target) == ("grouped", "cpu")
    assert data == build_graph(members, replace(card, form="grouped", target="cpu"))
    assert "fell back: the file is made for the CPU" in capsys.readouterr().err
    with pytest.raises(UserError, match="fell back; measure there, or name a form") as refused:
        build_best(members, card, "measure", "cuda")
    assert "`device`" not in str(refused.value)  # which export does not have


def test_grouped_leaves_the_members_as_they_were() -> None:
    members, card = ensemble("resnet8", 3, 3, 8)
    before = [member.state_dict() for member in members]
    images = torch.from_numpy(to_float(probe(card)))
    logits, own = fuse(members, "grouped")(images)
    expected = torch_scores(members, images)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(own, expected.member_logits, atol=1e-4)
    for member, state in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, state[name])


SHAPES = st.fixed_dictionaries(
    {
        "count": st.integers(1, 8),
        "depth": st.sampled_from([8, 14]),
        "width": st.integers(1, 6),
        "channels": st.sampled_from([1, 3]),
        "height": st.integers(8, 20),
        "side": st.integers(8, 20),
        "classes": st.integers(2, 6),
        "batch": st.integers(1, 9),
        "grouped": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def random_ensemble(shape: dict[str, int], folder: Path) -> None:
    torch.manual_seed(shape["seed"])
    channels, classes, count = shape["channels"], shape["classes"], shape["count"]
    members = lively(
        [
            Member(
                resnet_stages(f"resnet{shape['depth']}", channels, shape["width"], classes),
                [0.4] * channels,
                [0.3] * channels,
            )
            for _ in range(count)
        ]
    )
    card = card_of(channels, shape["height"], shape["side"], classes, count)
    form: FusionMode = "grouped" if shape["grouped"] and can_group(members) else "branches"
    engine = engine_of(build_graph(members, replace(card, form=form)), folder)
    draw = np.random.default_rng(shape["seed"])
    images = draw.random((shape["batch"], *card.input_shape), dtype=np.float32)
    expected, found = torch_scores(members, torch.from_numpy(images)), engine.run(images)
    allowed = 1e-4 * max(1.0, float(np.abs(expected.member_logits).max()))
    np.testing.assert_allclose(found.logits, expected.logits, atol=allowed)
    np.testing.assert_allclose(found.member_logits, expected.member_logits, atol=allowed)


OWN_FOLDER = [HealthCheck.function_scoped_fixture]


@settings(max_examples=5, deadline=None, suppress_health_check=OWN_FOLDER, derandomize=True)
@given(SHAPES)
def test_random_ensembles(tmp_path: Path, shape: dict[str, int]) -> None:
    random_ensemble(shape, tmp_path)


@pytest.mark.long
@settings(max_examples=150, deadline=None, suppress_health_check=OWN_FOLDER)
@given(SHAPES)
def test_random_ensembles_at_length(tmp_path: Path, shape: dict[str, int]) -> None:
    random_ensemble(shape, tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ensemble, Engine]:
    members, card = ensemble("resnet8", 3, 1, 8)
    folder = tmp_path_factory.mktemp("pair")
    return members, engine_of(build_graph(members, replace(card, form="grouped")), folder)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.just(1), st.just(8), st.just(8)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_any_image(pair: tuple[Ensemble, Engine], images: Any) -> None:
    members, engine = pair
    expected, found = torch_scores(members, torch.from_numpy(images)), engine.run(images)
    allowed = 1e-4 * max(1.0, float(np.abs(expected.member_logits).max()))
    np.testing.assert_allclose(found.member_logits, expected.member_logits, atol=allowed)
    np.testing.assert_allclose(found.logits, expected.logits, atol=allowed)
