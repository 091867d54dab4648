"""Surrogates: networks that an attacker could train, and which of them attack what."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dverge_serve.progress import Progress
from tests.conftest import TINY
from training.config import Config
from training.data.splits import Split, load_training
from training.models.resnet import family, resnet_stages
from training.recipe import load_recipe
from training.runs.directory import Run
from training.runs.lock import locked
from verification.surrogate import part_sha256
from verification.surrogates import (
    surrogate_config,
    surrogate_sets,
    surrogates,
    with_known_start,
)

CPU = torch.device("cpu")


def digits(**changes: object) -> Config:
    return load_recipe("digits", {**TINY, "standard.epochs": 1, "data.train_limit": 64, **changes})


@pytest.mark.parametrize(
    ("architecture", "relatives"),
    [
        ("resnet8", ["resnet8-leaky", "resnet14", "resnet14-leaky", "resnet11-bottleneck"]),
        (
            "resnet20-bottleneck-leaky",
            [
                "resnet20-bottleneck",
                "resnet29-bottleneck-leaky",
                "resnet29-bottleneck",
                "resnet14-leaky",
            ],
        ),
        ("torchvision:resnet18", []),
    ],
)
def test_relatives_of_an_architecture(architecture: str, relatives: list[str]) -> None:
    assert family(architecture) == [architecture, *relatives]
    for name in relatives:
        assert resnet_stages(name, 1, 4, 10)


def test_mixed_surrogates_have_the_models_architecture_and_its_relatives() -> None:
    mixed = surrogate_config(digits(), "mixed-5")
    assert mixed is not None
    assert mixed.architecture == tuple(family("resnet8"))
    two = digits(members=2, architecture=["resnet14", "resnet8"])
    both = surrogate_config(two, "mixed-5")
    assert both is not None
    assert both.architectures[:2] == ("resnet14", "resnet8")
    assert len(set(both.architectures)) == 5
    other = surrogate_config(digits(architecture="torchvision:resnet18"), "mixed-5")
    assert other is not None
    assert other.architectures == ("torchvision:resnet18",) * 5


def test_ensembles_that_differ_in_size_are_parts_of_the_largest() -> None:
    kinds = ["standard-3", "standard-8", "standard-5", "deeper-3", "no-such-method-2"]
    large, deeper = surrogate_sets(digits(), kinds)
    assert large.config.members == 8
    assert {name: own for name, own in large.parts.items() if len(own) > 1} == {
        f"surrogate-standard-{size}": tuple(range(size)) for size in (3, 5, 8)
    }
    assert {name: own for name, own in large.parts.items() if len(own) == 1} == {
        f"member {index} of surrogate-standard-8": (index,) for index in range(8)
    }
    assert len(deeper.parts) == 4


def test_parts_know_what_they_share(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    data = load_training(digits().data)
    found = {
        each.name.removeprefix("surrogate-"): each
        for each in surrogates(surrogate_sets(digits(), ["mixed-2", "mixed-3"]), data, CPU)
    }
    assert "surrogates, standard training, 3 members" in capsys.readouterr().err
    two, three = found["mixed-2"], found["mixed-3"]
    last = found["member 2 of surrogate-mixed-3"]
    assert two.members == three.members[:2]
    whole = three.origin.sha256
    assert three.weights == whole
    assert two.weights == part_sha256(whole, (0, 1), 3) != last.weights
    assert last.shares(three.networks)
    assert last.shares(last.networks)
    assert not last.shares(two.networks)
    assert two.to_json()["architecture"] == ["resnet8", "resnet8-leaky"]
    assert last.to_json()["architecture"] == "resnet14"


def test_surrogates_begin_from_the_models_published_weights(
    tiny_run: Path, tmp_path: Path, cache: Path
) -> None:
    tensors = load_file(tiny_run / "standard.safetensors")
    published = tmp_path / "published.safetensors"
    one = {
        name.removeprefix("member0."): each
        for name, each in tensors.items()
        if name.startswith("member0.")
    }
    save_file(one, published)
    config, why = with_known_start(digits(start=str(published)), None)
    assert (config.start, why) == (str(published), "")
    # Its weights fit no other architecture, and deeper ones begin at random.
    (mixed,) = surrogate_sets(config, ["mixed-3"])
    assert (mixed.config.architectures, mixed.config.start) == (("resnet8",) * 3, str(published))
    deeper = surrogate_config(config, "deeper-3")
    assert deeper is not None
    assert deeper.start == ""
    data = load_training(config.data)
    before = mixed.folder(data)
    first, *_ = surrogates([mixed], data, CPU)
    assert first.to_json()["start"][0]["file"] == "published.safetensors"
    save_file({name: each + 1 for name, each in one.items() if each.is_floating_point()}, published)
    assert mixed.folder(data) != before  # other weights, another surrogate


def test_weights_that_nobody_else_has_start_no_surrogates(tiny_run: Path, tmp_path: Path) -> None:
    run = Run.open_finished(tiny_run)
    for start, words in (
        (tiny_run / "standard.safetensors", "an ensemble"),
        (tmp_path / "none.safetensors", "cannot read"),
    ):
        config, why = with_known_start(digits(start=str(start)), run)
        assert config.start == ""
        assert words in why
    assert with_known_start(digits(), run) == (digits(), "")


def test_surrogates_are_strangers_trained_like_the_model_and_cached(cache: Path) -> None:
    config = load_recipe(
        "digits", {"width": 8, "standard.epochs": 1, "data.train_limit": 64, "seed": 7}
    )
    wanted = surrogate_config(config, "standard-3")
    assert wanted is not None
    assert wanted.seed > 2**32 - 1
    assert wanted.standard == config.standard
    assert wanted.architecture == config.architecture
    deeper, dverge = surrogate_config(config, "deeper-3"), surrogate_config(config, "dverge-3")
    assert deeper is not None
    assert deeper.architecture == "resnet14"
    assert dverge is not None
    assert (dverge.method, dverge.dverge) == ("dverge", config.dverge)
    assert surrogate_config(config, "no-such-method-3") is None
    data, cpu = load_training(config.data), torch.device("cpu")
    first, *alone = surrogates(
        surrogate_sets(config, ["standard-3", "no-such-method-3"]), data, cpu
    )
    assert [each.name for each in alone] == [
        f"member {index} of surrogate-standard-3" for index in range(3)
    ]
    assert len({first.weights, *(each.weights for each in alone)}) == 4
    (wanted_set,) = surrogate_sets(config, ["standard-3"])
    kept = wanted_set.folder(data) / "members.safetensors"
    stamp = kept.stat().st_mtime_ns
    second = surrogates([wanted_set], data, cpu)[0]
    assert second.networks == first.networks
    assert kept.stat().st_mtime_ns == stamp
    assert isinstance(data.train, Split)
    other = Split(data.train.images, data.train.labels.flip(0))
    data = type(data)(data.labels, other, data.holdout)
    third = surrogates([wanted_set], data, cpu)[0]
    assert not third.shares(first.networks)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_surrogate_that_somebody_else_is_training_is_waited_for(cache: Path) -> None:
    config = load_recipe("digits", TINY | {"data.train_limit": 300, "standard.epochs": 1})
    data, cpu = load_training(config.data), torch.device("cpu")
    sets = surrogate_sets(config, ["standard-3"])
    folder = sets[0].folder(data)
    with ThreadPoolExecutor(1) as other:
        with locked(folder):
            found = other.submit(surrogates, sets, data, cpu)
            with pytest.raises(TimeoutError):  # neither refused nor begun
                found.result(timeout=2)
            assert [each.name for each in folder.iterdir()] == [".lock"]
        assert found.result()[0].origin.sha256 == Run(folder).weights_sha256
