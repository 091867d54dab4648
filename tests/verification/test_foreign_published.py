"""Two traffic-sign classifiers of others: their contracts are found, and what gradients they have.

One is binarised (VNN-COMP 2023): NHWC, 0..255, softmax, no gradient anywhere. The other fixes its
batch at one image.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from dverge_serve.errors import UserError
from training.config import Config
from training.data.splits import TrainingData, load_test, load_training
from verification.attacks.gradient_attack import GradientAttack
from verification.foreign_model import ForeignEngine, open_engine
from verification.foreign_network import find_foreign_gradients
from verification.gradients import flow
from verification.metrics.robust_accuracy import clean_scores
from verification.model_gates import nonzero_gradient

# The official classes 0 to 42; folders are sorted by these words instead.
SIGNS = (
    *("limit-20", "limit-30", "limit-50", "limit-60", "limit-70", "limit-80", "end-80"),
    *("limit-100", "limit-120", "no-passing", "no-passing-trucks", "priority-at-next"),
    *("priority-road", "yield", "stop", "no-vehicles", "no-trucks", "no-entry"),
    *("general-caution", "curve-left", "curve-right", "double-curve", "bumpy", "slippery"),
    *("narrows-right", "road-work", "traffic-signals", "pedestrians", "children", "bicycles"),
    *("ice", "wild-animals", "end-all", "turn-right", "turn-left", "ahead", "ahead-or-right"),
    *("ahead-or-left", "keep-right", "keep-left", "roundabout", "end-no-passing"),
    "end-no-passing-trucks",
)
EACH = {"train": 20, "test": 2}
ATTACK = GradientAttack(name="pgd", threat="white_box", source="target", loss="cw")


@pytest.fixture(scope="module")
def signs(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of each class."""
    archive = test_data / "gtsrb.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    folder, kept = tmp_path_factory.mktemp("signs"), Counter[tuple[str, str]]()
    with tarfile.open(archive) as tar:
        for member in tar:
            part, name, file = (["", "", "", *Path(member.name).parts])[-3:]
            if member.isfile() and part in EACH and kept[part, name] < EACH[part]:
                kept[part, name] += 1
                content = tar.extractfile(member)
                assert content is not None
                place = folder / part / name
                place.mkdir(parents=True, exist_ok=True)
                (place / file).write_bytes(content.read())
    return folder


def settled(file: Path, signs: Path) -> tuple[ForeignEngine, TrainingData, float]:
    """Return the classifier, the images, and its accuracy on the test images."""
    engine = open_engine(file, SIGNS, str(signs), {})
    config = Config.from_json(engine.card.training, "the recipe")
    data = load_training(config.data)
    engine = engine.settled(data, {}, search=True)
    labels, test = load_test(config.data)
    assert labels == engine.card.labels != SIGNS
    assert tuple(test.images.shape[1:]) == engine.file.shape  # scaled to the model's own input
    scores = clean_scores(engine, test)
    return engine, data, float((scores.predictions == test.labels.numpy()).mean())


def test_a_binarised_network_has_no_gradient_and_fails_the_gate(
    test_data: Path, signs: Path
) -> None:
    engine, data, accuracy = settled(test_data / "foreign" / "gtsrb_binarised_48.onnx", signs)
    contract = engine.contract
    assert (contract.layout, contract.pixel_max) == ("nhwc", 255)
    assert (contract.channels, contract.outputs) == ("rgb", "softmax")
    assert engine.file.shape == (3, 48, 48)
    assert accuracy > 0.85
    gradients, why = find_foreign_gradients(engine, torch.device("cpu"))
    assert gradients is not None, why
    zero, broken, _ = flow(gradients.members, data.holdout, [ATTACK])
    assert zero.all()
    assert nonzero_gradient(zero, broken).passed is False


def test_a_network_of_a_fixed_batch_has_gradients(test_data: Path, signs: Path) -> None:
    engine, data, accuracy = settled(test_data / "foreign" / "gtsrb_cnn_fixed_batch.onnx", signs)
    contract = engine.contract
    assert (engine.file.batch, engine.file.shape) == (1, (3, 32, 32))
    assert (contract.layout, contract.channels, contract.outputs) == ("nchw", "rgb", "logits")
    assert accuracy > 0.6
    gradients, why = find_foreign_gradients(engine, torch.device("cpu"))
    assert gradients is not None, why
    zero, broken, _ = flow(gradients.members, data.holdout, [ATTACK])
    assert not (zero | broken).any()


def test_names_in_the_order_of_the_folders_are_found_out(test_data: Path, signs: Path) -> None:
    file = test_data / "foreign" / "gtsrb_cnn_fixed_batch.onnx"
    engine = open_engine(file, sorted(SIGNS), str(signs), {})
    data = load_training(Config.from_json(engine.card.training, "the recipe").data)
    with pytest.raises(UserError, match="may be guessing"):
        engine.settled(data, {}, search=True)
