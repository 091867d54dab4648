"""Configuration: the recipes, what is refused and how, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dverge_serve.errors import UserError
from training.config import Config, differences
from training.recipe import load_recipe, parse_settings, recipe_names
from training.schedules import Dverge, Schedule

SCHEDULE: dict[str, Any] = {
    "epochs": 200,
    "budget": 0,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
    "milestones": (0.5, 0.75),
    "gamma": 0.1,
    "warmup": 0.25,
    "clip_norm": 0.0,
    "average": 0.0,
}

PUBLISHED = {
    "name": "cifar10",
    "method": "dverge",
    "architecture": "resnet20",
    "start": "",
    "weights": "",
    "freeze_batchnorm": False,
    "head_views": 0,
    "width": 16,
    "members": 3,
    "batch_size": 128,
    "precision": "auto",
    "graphs": "auto",
    "seed": 0,
    "tensorboard": False,
    "data": {
        "name": "cifar10",
        "path": "",
        "mode": "RGB",
        "crop": (32, 32),
        "resize": None,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "pad": 4,
        "flip": True,
        "augment": dict.fromkeys(("rotate", "scale", "shear", "brightness", "contrast"), 0.0),
        "holdout": 0.1,
        "group": "",
        "train_limit": 0,
        "test_limit": 0,
        "memory_gb": None,
        "workers": None,
    },
    "standard": SCHEDULE,
    "dverge": {
        **SCHEDULE,
        "eps": 0.07,
        "step_size": 0.007,
        "steps": 10,
        "decay": 1.0,
        "weight": 1.0,
        "clean_weight": 0.0,
        "layer_every": "epoch",
        "partners": 0,
        "batchnorm": "batch",
    },
    "adversarial": {**SCHEDULE, "eps": 8 / 255, "step_size": 2 / 255, "steps": 10},
    "transfer": {
        **SCHEDULE,
        "sources": "",
        "networks": 5,
        "copies": 4,
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "steps": 10,
    },
    "adp": {**SCHEDULE, "alpha": 2.0, "beta": 0.5},
    "gal": {**SCHEDULE, "weight": 0.5},
    "verification": {"eps": (0.01, 0.02, 0.03)},
}


def dotted(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


KEYS = sorted(dotted(PUBLISHED))


def refusal(overrides: dict[str, Any], recipe: str = "digits") -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_package_holds_the_recipes_of_the_documentation() -> None:
    assert {"digits", "cifar10", "cifar10-fast", "images"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_being_written_down(name: str) -> None:
    config = load_recipe(name)
    assert config.name == name
    assert Config.from_json(json.loads(json.dumps(config.to_json())), name) == config
    assert max(config.verification.eps) <= 0.5


def test_cifar10_is_the_published_recipe_to_the_letter() -> None:
    assert load_recipe("cifar10").to_json() == PUBLISHED


def test_the_published_learning_rate_falls_tenfold_at_epochs_100_and_150() -> None:
    stage = load_recipe("cifar10").dverge
    rates = [stage.lr_at(epoch, progress) for epoch in range(200) for progress in (0.0, 0.99)]
    assert rates == pytest.approx([0.1] * 200 + [0.01] * 100 + [0.001] * 100)


def test_one_cycle_rises_to_the_rate_and_falls_to_nothing() -> None:
    stage = Schedule(epochs=8, lr=0.4, schedule="one-cycle", warmup=0.25)
    rates = [stage.lr_at(epoch, 0.0) for epoch in range(8)]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.4 / 6 * 5, 0.4 / 6 * 4, 0.2, 0.4 / 3, 0.4 / 6])
    assert stage.lr_at(7, 1.0) == 0.0
    assert stage.lr_at(0, 0.5) == pytest.approx(0.1)
    assert Schedule(epochs=2, lr=0.4, schedule="one-cycle", warmup=0.0).lr_at(0, 0.0) == 0.4


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_is_told_its_nearest(key: str) -> None:
    message = refusal({key + "x": 1})
    assert f"unknown key '{key}x'" in message
    assert f"did you mean '{key}'" in message


def test_a_key_like_no_other_is_told_all_of_them() -> None:
    assert "known: adp, adversarial, architecture, batch_size, data" in refusal({"zzzzzz": 1})


def test_an_unknown_recipe_is_told_its_nearest() -> None:
    for name, suggestion in (("cifar", "did you mean 'cifar10'"), ("zzz", "known: cifar10, ")):
        with pytest.raises(UserError, match="unknown recipe") as caught:
            load_recipe(name)
        assert suggestion in str(caught.value)
        assert ".toml" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", "wide"),
        ("width", 2.5),
        ("width", True),
        ("members", 1),
        ("width", 0),
        ("batch_size", 1),
        ("seed", -1),
        ("name", 3),
        ("method", "bagging"),
        ("architecture", 20),
        ("data", 3),
        ("data.flip", 1),
        ("data.flip", "yes"),
        ("data.crop", [8]),
        ("data.crop", [8, 8, 8]),
        ("data.crop", [8.0, 8.0]),
        ("data.crop", [7, 8]),
        ("data.crop", 8),
        ("data.resize", [4, 4]),
        ("data.name", "imagenet"),
        ("data.mode", "CMYK"),
        ("data.holdout", 0.0),
        ("data.holdout", 0.6),
        ("data.mean", [0.1, 0.2, 0.3]),
        ("data.std", [0.0]),
        ("data.mean", [0.5]),
        ("data.pad", -1),
        ("data.train_limit", -5),
        ("standard.epochs", 0),
        ("standard.lr", 0),
        ("standard.lr", float("nan")),
        ("standard.lr", float("inf")),
        ("standard.gamma", float("nan")),
        ("standard.gamma", -0.1),
        ("standard.milestones", [0.5, 1.5]),
        ("standard.momentum", 1.0),
        ("standard.weight_decay", -1e-4),
        ("standard.warmup", 1.0),
        ("standard.schedule", "cosine"),
        ("dverge.eps", 0.0),
        ("dverge.eps", 1.1),
        ("dverge.steps", 0),
        ("dverge.step_size", 0.0),
        ("dverge.decay", float("inf")),
        ("dverge.decay", -1.0),
        ("dverge.layer_every", "step"),
        ("dverge.batchnorm", "train"),
        ("verification.eps", []),
        ("verification.eps", [0.1, 0.0]),
        ("verification.eps", 0.1),
    ],
)
def test_a_value_that_cannot_be_is_refused_naming_its_key(key: str, value: Any) -> None:
    message = refusal({key: value})
    named = {"data.mean": "data.std"} if value == [0.5] else {"data.resize": "resize"}
    assert named.get(key, key) in message
    assert "expected" in message


def test_a_key_inside_something_that_is_no_table_is_refused() -> None:
    assert "'width' is not a table" in refusal({"width.more": 1})


def test_whole_numbers_stand_for_floats_but_not_the_other_way() -> None:
    config = load_recipe("digits", {"standard.lr": 1})
    assert isinstance(config.standard.lr, float)
    assert config.standard.lr == 1.0


def test_radii_may_be_fractions() -> None:
    config = load_recipe("digits", {"verification.eps": ["8/255", 0.1]})
    assert config.verification.eps == (8 / 255, 0.1)
    for wrong in ("8/0", "8/x", "1/2/3", "eight"):
        with pytest.raises(UserError, match=r"verification\.eps = "):
            load_recipe("digits", {"verification.eps": [wrong]})


def test_settings_are_toml_values_and_bare_words() -> None:
    parsed = parse_settings(
        [
            "dverge.epochs=10",
            "standard.lr = 0.05",
            "data.flip=true",
            "architecture=resnet14",
            'name="two words"',
            "data.crop=[16, 24]",
            "data.path=/tmp/a=b",
        ]
    )
    assert parsed == {
        "dverge.epochs": 10,
        "standard.lr": 0.05,
        "data.flip": True,
        "architecture": "resnet14",
        "name": "two words",
        "data.crop": [16, 24],
        "data.path": "/tmp/a=b",
    }
    config = load_recipe("images", parsed)
    assert (config.dverge.epochs, config.data.crop, config.data.flip) == (10, (16, 24), True)


@pytest.mark.parametrize("pair", ["epochs", "=3", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_settings([pair])


@given(
    value=st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.booleans(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(min_codepoint=32, max_codepoint=126)),
        st.lists(st.integers(0, 100)),
    )
)
def test_a_setting_written_as_toml_comes_back_as_it_was(value: Any) -> None:
    assert parse_settings([f"key={json.dumps(value)}"]) == {"key": value}


@given(
    epochs=st.integers(1, 10**6),
    lr=st.floats(1e-9, 1e9),
    crop=st.tuples(st.integers(8, 512), st.integers(8, 512)),
    eps=st.lists(st.floats(1e-6, 1.0), min_size=1),
    path=st.text(),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_configuration_survives_being_written_down(
    epochs: int,
    lr: float,
    crop: tuple[int, int],
    eps: list[float],
    path: str,
    seed: int,
) -> None:
    config = load_recipe(
        "images",
        {
            "standard.epochs": epochs,
            "dverge.lr": lr,
            "data.crop": list(crop),
            "verification.eps": eps,
            "data.path": path,
            "seed": seed,
        },
    )
    again = Config.from_json(json.loads(json.dumps(config.to_json())), "again")
    assert again == config
    assert differences(config, again) == []


def test_differences_name_dotted_keys() -> None:
    one = load_recipe("digits")
    other = load_recipe("digits", {"dverge.eps": 0.1, "seed": 1, "data.pad": 2})
    assert differences(one, other) == ["data.pad", "dverge.eps", "seed"]
    assert differences(one, load_recipe("digits")) == []


def test_what_changes_no_result_is_no_difference() -> None:
    one = load_recipe("images")
    free = {"data.memory_gb": 0.5, "data.workers": 3, "graphs": "off", "tensorboard": True}
    other = load_recipe("images", free)
    assert (other.data.memory_gb, other.data.workers, other.tensorboard) == (0.5, 3, True)
    assert other.graphs == "off"
    assert differences(one, other) == []


def test_a_recipe_of_ones_own_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "vögel.toml"
    path.write_text('[data]\nname = "digits" # ü\nmode = "L"\ncrop = [8, 8]\n', encoding="utf-8")
    config = load_recipe(path, {"members": 5})
    assert load_recipe(str(path), {"members": 5}) == config
    assert (config.name, config.members, config.data.mode) == ("vögel", 5, "L")
    assert config.dverge == Dverge()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read recipe"),
        (b"members = ", "not valid TOML"),
        (b"\xff\xfe", "cannot read recipe"),
        (b"member = 3", "did you mean 'members'"),
        (b"[data]\nnmae = 'digits'", "did you mean 'data.name'"),
        (b"data = 3", "data = 3"),
    ],
)
def test_a_bad_recipe_file_is_one_line_naming_it(
    tmp_path: Path, content: bytes | None, part: str
) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    message = refusal({}, str(path))
    assert part in message
    assert "mine.toml" in message


def test_a_single_member_is_an_ensemble_only_of_the_standard_method() -> None:
    assert load_recipe("digits", {"method": "standard", "members": 1}).members == 1
    assert "members = 1" in refusal({"members": 1})
