"""Training on adversarial images of source models: the images, their sources, and the steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dverge_serve.errors import UserError
from tests.training.networks import stored, tiny_config, tiny_images, tiny_members
from tests.training.refusal import one_line
from tests.training.stopping import stopped_at_its_first_state
from training.config import MAX_SEED, SOURCE_SEED, Config
from training.data.splits import load_training
from training.methods import stored_images, transfer
from training.methods.dverge import distill
from training.methods.dverge_draws import layer_of
from training.methods.source_models import given_sources, sources_config
from training.methods.stored_images import StoredImages
from training.models.bn_folding import folded
from training.models.state_dict import network_sha256
from training.parallel.topology import SINGLE_PROCESS
from training.runs.directory import Run
from training.trainer import train

CPU = torch.device("cpu")
SOURCE, TARGET = tiny_images(5), tiny_images(5, seed=1)
LABELS = torch.tensor([0, 1, 2, 3, 1])


def transfer_config(**more: Any) -> Config:
    """Return a run of a second, on two sources given or trained."""
    few = {"networks": 2, "copies": 2, "steps": 2, "epochs": 2, "eps": 0.1, "step_size": 0.05}
    settings = {f"transfer__{key}": value for key, value in few.items()}
    return tiny_config(**({"method": "transfer", "standard__epochs": 1} | settings | more))


def some_images() -> StoredImages:
    """Return three sets of four images, each pixel of set `s` and row `r` at level `10 s + r`."""
    levels = (10 * np.arange(3)[:, None] + np.arange(4)).astype(np.uint8)
    images = np.broadcast_to(levels[:, :, None, None, None], (3, 4, 1, 8, 8))
    return StoredImages(images, torch.arange(4), [])


def moved(members: list[Any], loss: Tensor) -> list[Tensor]:
    parameters = [parameter for member in members for parameter in member.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    return [(p - 0.1 * g).detach() for p, g in zip(parameters, gradients, strict=True)]


def test_draws_are_labelled_images_of_any_source_and_copy_and_depend_on_the_seed_alone() -> None:
    images, labels = some_images().draw(600, CPU, 7, "transfer", 0)
    levels = (images[:, 0, 0, 0] * 255).round().int()
    assert (levels % 10).tolist() == labels.tolist()
    counts = levels.bincount()
    assert all(25 <= int(counts[10 * s + r]) <= 80 for s in range(3) for r in range(4))
    again, _ = some_images().draw(600, CPU, 7, "transfer", 0)
    other, _ = some_images().draw(600, CPU, 7, "transfer", 1)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_the_step_is_half_clean_and_half_adversarial_and_each_member_draws_its_own() -> None:
    members, config = tiny_members(2), replace(transfer_config(), seed=3)
    drawn, losses = [], []
    for index, member in enumerate(members):
        images, classes = some_images().draw(5, CPU, 3, "transfer", 4, 2, index)
        logits = member.train()(torch.cat([SOURCE, images.double()]))
        half = F.cross_entropy(logits[:5], LABELS) + F.cross_entropy(logits[5:], classes)
        losses.append(half / 2)
        drawn.append(images)
    assert not torch.equal(*drawn)
    wanted = moved(members, torch.stack(losses).sum())
    again = tiny_members(2)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in again]
    step = transfer.make_step(config, again, optimizers, SINGLE_PROCESS, some_images())
    assert step(4, 2, (SOURCE, LABELS, SOURCE)).tolist() == pytest.approx(
        [loss.item() for loss in losses], abs=1e-12
    )
    found = [parameter for member in again for parameter in member.parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_dverge_with_transfer_adds_that_to_the_sum() -> None:
    config = transfer_config(method="dverge+transfer", dverge__weight=0.5, dverge__steps=1)
    members, settings = tiny_members(2), config.dverge
    layer = layer_of(config, members, 1, 0)
    made = [distill(each, SOURCE, TARGET, layer=layer, settings=settings) for each in members]
    total = torch.zeros(())
    for index, member in enumerate(members):
        images, classes = some_images().draw(5, CPU, 0, "dverge", 1, 0, index)
        own = member.train()(torch.cat([SOURCE, images.double()]))
        total = total + F.cross_entropy(own, torch.cat([LABELS, classes]))
        total = total + 0.5 * F.cross_entropy(member(made[1 - index]), LABELS)
    wanted = moved(members, total)
    again = tiny_members(2)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in again]
    step = transfer.make_dverge_step(config, again, optimizers, SINGLE_PROCESS, some_images())
    step(1, 0, (SOURCE, LABELS, TARGET))
    found = [parameter for member in again for parameter in member.parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_stored_images_stay_in_the_ball_and_fool_their_source(
    finished: Path, tmp_path: Path
) -> None:
    config = transfer_config(transfer__sources=str(finished), data__pad=0)
    data, run = load_training(config.data), Run(tmp_path)
    found = stored_images.keep_images(config, data, run, CPU, train)
    assert found is not None
    assert found.images.shape == (4, len(data.train), 1, 8, 8)
    clean = stored(data.train).images.numpy().astype(int)
    change = np.abs(found.images.astype(int) - clean)
    assert change.max() == 25  # of .1 x 255
    assert not np.array_equal(found.images[0], found.images[1])  # two copies
    network = Run(finished).members()[0]
    accuracies = []
    for pixels in (clean, np.array(found.images[0])):
        answers = network(torch.from_numpy(pixels / 255).float()).argmax(1)
        accuracies.append(float((answers == found.labels).float().mean()))
    assert accuracies[1] < accuracies[0] - 0.1
    names = [each["name"] for each in found.sources]
    assert names == [f"member {index} of {finished.name}" for index in range(2)]


@pytest.mark.parametrize("method", ["transfer", "dverge+transfer"])
def test_a_run_goes_on_with_the_images_it_began_with(
    method: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transfer_config(method=method, transfer__sources=str(finished))
    whole = train(config, tmp_path / "whole", device=CPU)
    assert not list(whole.path.glob("sources.*"))  # they are large, and done with
    sources = whole.checkpoint["sources"]
    assert [each["sha256"] for each in sources] == [
        network_sha256(folded(each)) for each in Run(finished).members()
    ]
    stopped_at_its_first_state(config, tmp_path / "cut", monkeypatch)
    monkeypatch.setattr(stored_images, "given_sources", lambda *_: pytest.fail("not needed"))
    cut = train(config, tmp_path / "cut", device=CPU, resume=True)
    assert cut.weights_sha256 == whole.weights_sha256
    assert cut.checkpoint["sources"] == sources


def test_damaged_images_are_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transfer_config(transfer__sources=str(finished))
    whole = train(config, tmp_path / "whole", device=CPU)
    stopped_at_its_first_state(config, tmp_path / "cut", monkeypatch)
    images = tmp_path / "cut" / stored_images.IMAGES
    images.write_bytes(images.read_bytes()[:-9])
    cut = train(config, tmp_path / "cut", device=CPU, resume=True)
    assert cut.weights_sha256 == whole.weights_sha256


def test_sources_that_are_not_given_are_trained_once_from_seeds_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path / "cache"))  # nobody else's sources
    config = transfer_config(architecture=["resnet8", "resnet14"])
    wanted = sources_config(config)
    assert wanted.seed > SOURCE_SEED > MAX_SEED + 1000  # most surrogates there can be
    assert wanted.architectures == ("resnet8", "resnet14")
    assert sources_config(replace(config, seed=9)) == wanted  # the same for every seed
    run = train(config, tmp_path / "run", device=CPU)
    (folder,) = (tmp_path / "cache/sources").iterdir()
    before = (folder / "members.safetensors").stat().st_mtime_ns
    other = train(replace(config, seed=9), tmp_path / "other", device=CPU)
    assert (folder / "members.safetensors").stat().st_mtime_ns == before
    assert run.checkpoint["sources"] == other.checkpoint["sources"]
    stages = [json.loads(x)["stage"] for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["standard", "transfer", "transfer"]


def test_sources_are_runs_folders_of_runs_or_safetensors(finished: Path, tmp_path: Path) -> None:
    networks = Run(finished).members()
    hashes = [network_sha256(folded(each)) for each in networks]
    single = tmp_path / "single.safetensors"
    save_file(networks[1].state_dict(), single)
    for named, expected in (
        (finished, hashes),
        (finished.parent, hashes),
        (finished / "members.safetensors", hashes),
        (single, hashes[1:]),
    ):
        config = transfer_config(transfer__sources=str(named))
        found = given_sources(config, load_training(config.data))
        assert [each.to_json()["sha256"] for each in found] == expected


@pytest.mark.parametrize(
    ("named", "words"),
    [("empty", "no finished run in"), ("none.safetensors", "cannot read")],
)
def test_sources_that_are_not_there_are_refused_before_anything_is_written(
    named: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = transfer_config(transfer__sources=str(tmp_path / named))
    with pytest.raises(UserError, match=words) as caught:
        train(config, tmp_path / "out", device=CPU)
    one_line(caught)
    assert not (tmp_path / "out").exists()


def test_sources_of_other_images_are_refused(finished: Path) -> None:
    config = transfer_config(transfer__sources=str(finished))
    data = load_training(config.data)
    with pytest.raises(UserError, match="has 10 classes and takes") as caught:
        given_sources(config, replace(data, labels=("cat", "dog")))
    one_line(caught)
