"""Source models: whoever attacks with networks that the model has learnt from proves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dverge_serve.engine.card import Card
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export import export
from tests.conftest import TINY
from training.models.bn_folding import folded
from training.models.state_dict import network_sha256
from training.recipe import load_recipe
from training.runs.directory import Run
from training.trainer import train
from verification import verify
from verification.given_surrogates import given_surrogates
from verification.source_models import refuse_sources

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained_against(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt from the attacks of another run's members."""
    folder = tmp_path_factory.mktemp("transfer")
    transfer = {"sources": str(tiny_run), "epochs": 1, "copies": 1, "steps": 1}
    config = load_recipe(
        "digits",
        TINY
        | {"method": "transfer", "standard.epochs": 1}
        | {f"transfer.{key}": value for key, value in transfer.items()},
    )
    run = train(config, folder / "runs" / "defended", device=CPU)
    export(run, folder / "model.onnx")
    return folder / "model.onnx"


def test_the_model_file_names_its_sources_and_no_path(
    trained_against: Path, tiny_run: Path
) -> None:
    card = Engine(trained_against, device="cpu").card
    assert [each["sha256"] for each in card.training["source_models"]] == [
        network_sha256(folded(each)) for each in Run(tiny_run).members()
    ]
    assert str(tiny_run.parent) not in str(card.to_json())


def test_a_source_is_no_surrogate(trained_against: Path, tiny_run: Path) -> None:
    with pytest.raises(UserError, match=r"networks that the model was trained against") as caught:
        verify(trained_against, surrogates=tiny_run.parent, device="cpu")
    assert "\n" not in str(caught.value)
    assert not trained_against.with_name("model.report.json").exists()


def test_other_networks_are_and_one_source_among_them_is_found(
    trained_against: Path, tiny_model: Path, tiny_run: Path
) -> None:
    card = Engine(trained_against, device="cpu").card
    found = given_surrogates([tiny_run.parent], card.labels, card.input_shape, CPU)
    strangers: Card = Engine(tiny_model, device="cpu").card
    refuse_sources(found, strangers)  # has no sources
    other = [each | {"sha256": "0" * 64} for each in card.training["source_models"]]
    refuse_sources(found, replace(card, training=card.training | {"source_models": other}))
    last = [*other[:2], card.training["source_models"][2]]
    alone = [each for each in found if each.indices == (2,)]
    with pytest.raises(UserError, match="member 2 of"):
        refuse_sources(alone, replace(card, training=card.training | {"source_models": last}))
    refuse_sources(
        [each for each in found if each.indices == (1,)],
        replace(card, training=card.training | {"source_models": last}),
    )
