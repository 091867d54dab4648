"""Torchvision's published weights by name: preprocessing, files, and what begins from them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from tests.training.stopping import stopped_at_its_first_state
from training import published_weights
from training.config import Config
from training.data.splits import load_training
from training.estimate import estimate
from training.methods import dverge
from training.methods.last_layers import RIDGE, fit, fit_last_layers
from training.models.build import build_members
from training.models.member import Member
from training.models.pretrained import Start, last_layer
from training.published_weights import find, preprocessing
from training.recipe import load_recipe, recipe_for
from training.trainer import train
from verification.surrogates import surrogate_config, with_known_start

CPU = torch.device("cpu")
NAME = "torchvision:mobilenet_v3_small"
# Digits, whose size and mode are fixed: only the normalisation follows the weights.
TINY: dict[str, Any] = {
    "architecture": NAME,
    "data__train_limit": 40,
    "standard__epochs": 1,
    "dverge__epochs": 1,
    "dverge__steps": 1,
}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `NAME`'s weights, random ones under a name with their hash, in torch's cache."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    torch.save(models.mobilenet_v3_small().state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    file = (folder / "weights.pth").rename(folder / f"mobilenet-{digest[:8]}.pth")
    url = f"https://example.invalid/models/{file.name}"
    monkeypatch.setattr(WeightsEnum, "url", property(lambda _: url))
    return file


def tiny(**changes: Any) -> Config:
    return tiny_config(**(TINY | {"weights": "IMAGENET1K_V1"} | changes))


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        Start.read(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_size_and_normalisation_are_those_of_the_weights() -> None:
    data = load_recipe("images", {"architecture": NAME, "weights": "DEFAULT"}).data
    # The recipe names its own size; its proportion to the resized image is the weights'.
    assert (data.crop, data.resize) == ((32, 32), (37, 37))
    found = preprocessing(find("torchvision:mobilenet_v2", "IMAGENET1K_V2"), {})
    assert (found["crop"], found["resize"]) == ([224, 224], [232, 232])
    assert (found["mean"], found["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found["interpolation"] == "bilinear"
    vit = find("torchvision:vit_b_16", "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1")
    assert preprocessing(vit, {"pad": 1})["interpolation"] == "bicubic"


def test_what_a_recipe_sets_stays() -> None:
    entry = find(NAME, "DEFAULT")
    own = {"crop": [96, 64], "resize": [100, 100], "mean": [0.5] * 3, "std": [0.2] * 3}
    assert preprocessing(entry, own) == own | {"interpolation": "bilinear"}
    assert preprocessing(entry, {"crop": [96, 64]})["resize"] == [110, 73]
    grey = preprocessing(entry, {"mode": "L"})
    assert grey["mean"] == [pytest.approx(0.449)]
    assert len(grey["std"]) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "IMAGENET1K_V7"}, "has no weights 'IMAGENET1K_V7'; expected DEFAULT or one"),
        ({"architecture": "resnet20"}, "expected a classifier of torchvision"),
        ({"architecture": "torchvision:resnot"}, "expected a classifier of torchvision"),
    ],
)
def test_weights_that_are_not_there(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("photographs", settings)


def test_folders_take_the_recipe_of_photographs_where_weights_are_named() -> None:
    assert recipe_for("photos", weights=True) == ("photographs", {})
    assert recipe_for("photos") == ("images", {})
    assert recipe_for("cifar10", weights=True)[0] == "cifar10"
    assert recipe_for(None, weights=True)[0] == "digits"


def test_without_a_connection_the_message_says_where_the_file_goes(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.unlink()

    def offline(*_: Any, **settings: Any) -> None:
        assert settings["check_hash"]
        assert settings["weights_only"]
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    message = refusal(tiny())
    assert "cannot download https://example.invalid/models/mobilenet-" in message
    assert f"put the file at {published}, or give it as `start`" in message


def test_a_damaged_file_is_refused(published: Path) -> None:
    published.write_bytes(published.read_bytes()[:-9])
    assert f"{published} is damaged" in refusal(tiny())


def test_members_begin_from_the_weights_and_a_file_takes_their_place(published: Path) -> None:
    start = Start.read(tiny())
    assert start is not None
    assert [file["file"] for file in start.files] == [published.name]
    assert start.published
    members = build_members(tiny(), 10, [0.5], [0.5])
    start.put_into(members)
    stored = torch.load(published, weights_only=True)
    for member in members:
        assert torch.equal(
            member.state_dict()["network.features.0.0.weight"], stored["features.0.0.weight"]
        )
    assert start.drawn(members) == [True, True]
    moved = published.rename(published.with_name("elsewhere.pth"))  # nothing is downloaded
    given = Start.read(tiny(start=str(moved)))
    assert given is not None
    assert given.files[0]["file"] == "elsewhere.pth"


def test_each_architecture_of_a_list_has_its_own_file(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_weights, "_file", lambda entry: Path(str(entry)))
    mixed = ("torchvision:resnet18", NAME)
    named = "ResNet18_Weights.IMAGENET1K_V1", "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    assert published_weights.paths(mixed, "DEFAULT") == named
    assert published_weights.paths((NAME, NAME), "DEFAULT") == named[1:]


def test_a_dry_run_says_what_fitting_takes(published: Path) -> None:
    one = {"members": 1, "method": "standard", "data__train_limit": 20}
    for views, count in ((2, 1), (0, 0)):
        notes = estimate(tiny(head_views=views, **one), CPU)["notes"]
        assert sum("1 last layers: fitted to features first, about" in n for n in notes) == count


def test_surrogates_begin_from_the_same_weights(published: Path) -> None:
    config, why = with_known_start(tiny(head_views=2, freeze_batchnorm=True), None)
    assert why == ""
    for kind in ("standard-3", "mixed-3", "dverge-2"):
        surrogate = surrogate_config(config, kind)
        assert surrogate is not None
        assert (surrogate.weights, surrogate.head_views) == ("IMAGENET1K_V1", 2)
        start = Start.read(surrogate)
        assert start is not None
        assert start.files[0]["file"] == published.name
        assert len(start.weights) == surrogate.members
    published.write_bytes(b"something else")
    bare, why = with_known_start(tiny(), None)
    assert bare.weights == ""
    assert "damaged" in why


def test_a_run_fits_last_layers_once_and_keeps_the_statistics(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []

    def counted(*arguments: Any) -> None:
        fitted.append(arguments)
        fit_last_layers(*arguments)

    monkeypatch.setattr("training.trainer.fit_last_layers", counted)
    monkeypatch.setattr("training.trainer.SAVE_EVERY_S", 0.0)
    one = {"members": 1, "method": "standard", "standard__epochs": 2, "data__train_limit": 20}
    config = tiny(head_views=1, freeze_batchnorm=True, **one)
    whole = train(config, tmp_path / "whole", device=CPU)
    stopped_at_its_first_state(config, tmp_path / "run", monkeypatch)
    run = train(config, tmp_path / "run", device=CPU, resume=True)
    assert run.weights_sha256 == whole.weights_sha256
    assert len(fitted) == 2
    assert run.checkpoint["start"][0]["file"] == published.name
    stored = torch.load(published, weights_only=True)
    state = run.members()[0].state_dict()
    for name, same in (("0.1.running_mean", True), ("0.0.weight", False)):
        assert torch.equal(state[f"network.features.{name}"], stored[f"features.{name}"]) is same


def fitted_members(published: Path, views: int) -> list[Member]:
    config = tiny(head_views=views)
    data, start = load_training(config.data), Start.read(config)
    assert start is not None
    members = build_members(config, 10, [0.5], [0.5])
    start.put_into(members)
    fit_last_layers(config, members, start, data.train, "weights")
    return members


def test_a_fitted_layer_is_the_minimum_near_its_random_draw() -> None:
    (member,) = build_members(tiny_config(members=1, method="standard"), 3, [0.5], [0.5])
    layer = last_layer(member)[1]
    assert isinstance(layer, nn.Linear)
    drawn = [each.detach().clone() for each in layer.parameters()]
    labels = torch.arange(60) % 3
    features = nn.functional.one_hot(labels, layer.in_features).float()
    features += 0.1 * torch.randn(60, layer.in_features, generator=torch.manual_seed(0))
    fit(member, features, labels)
    assert torch.equal(layer(features).argmax(1), labels)
    loss = nn.functional.cross_entropy(layer(features), labels)
    pairs = zip(layer.parameters(), drawn, strict=True)
    total = loss + RIDGE * torch.stack([(now - was).square().sum() for now, was in pairs]).sum()
    for gradient in torch.autograd.grad(total, list(layer.parameters())):
        assert float(gradient.abs().max()) < 1e-3
    assert all(each.grad is None for each in layer.parameters())


def test_only_last_layers_are_fitted_and_each_to_views_of_its_own(published: Path) -> None:
    drawn, members = fitted_members(published, 0), fitted_members(published, 1)
    one, other = (last_layer(member)[1].weight for member in members)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    assert not torch.equal(one, other)
    for before, after in zip(drawn, members, strict=True):
        changed = {
            name
            for name, tensor in after.state_dict().items()
            if not torch.equal(tensor, before.state_dict()[name])
        }
        assert changed == {f"{last_layer(after)[0]}.{part}" for part in ("weight", "bias")}


def test_frozen_batchnorm_stays_in_evaluation_mode_in_every_part() -> None:
    (member,) = build_members(tiny_config(**TINY, members=1, method="standard"), 3, [0.5], [0.5])
    member.freeze_batchnorm = True
    member.train()
    for layer in (2, 5, member.depth):
        norms = [each for each in member.modules_upto(layer) if isinstance(each, nn.BatchNorm2d)]
        assert norms
        assert not any(each.training for each in norms)
    assert any(each.training for each in member.modules() if isinstance(each, nn.Dropout))


def test_clean_images_join_the_loss_by_their_weight() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    losses = []
    for weight in (0.0, 1.0, 3.0):
        config = tiny_config(dverge__steps=1, dverge__clean_weight=weight)
        members = build_members(config, 4, [0.5], [0.5])
        optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]
        found = dverge.step(
            members, optimizers, images, labels, images.flip(0), layer=3, settings=config.dverge
        )
        losses.append(found)
    clean = losses[1] - losses[0]
    torch.testing.assert_close(losses[2] - losses[0], 3 * clean)
    fresh = build_members(tiny_config(), 4, [0.5], [0.5])
    for member, own in zip(fresh, clean, strict=True):
        torch.testing.assert_close(nn.functional.cross_entropy(member(images), labels), own)


def test_a_clipped_gradient_moves_a_member_no_further_than_its_norm(tmp_path: Path) -> None:
    moved = {}
    for most in (0.0, 1e-3, 1e9):
        config = tiny_config(
            members=1, method="standard", batch_size=90, standard__epochs=1, standard__lr=1.0,
            standard__weight_decay=0.0, standard__clip_norm=most,
        )  # fmt: skip
        (before,) = build_members(config, 10, [0.5], [0.5])
        (after,) = train(config, tmp_path / str(most), device=CPU).members()
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        moved[most] = float(
            torch.stack([(one - other).detach().square().sum() for one, other in pairs])
            .sum()
            .sqrt()
        )
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[0.0] == moved[1e9] > 0.1
