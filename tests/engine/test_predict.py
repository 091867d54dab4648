"""`Engine.predict` and MAITE's `Model` protocol: the service's answers, without a service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from dverge_serve import Engine
from dverge_serve.engine.outputs import softmax
from dverge_serve.images import ImageError
from tests.serving import tiny

VALUES = (255, 0, 102, 140)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("engine") / "model.onnx"
    tiny.save_gray_model(found)
    return found


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return Engine(str(path), device="cpu")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, dverge_serve; heavy = {'numpy', 'onnxruntime', 'torch', 'PIL', 'bentoml'};"
        "assert not heavy & set(sys.modules); from dverge_serve import Engine;"
        "assert 'torch' not in sys.modules; print(Engine.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "dverge_serve.engine.session\n"


def test_the_package_offers_nothing_else() -> None:
    import dverge_serve

    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = dverge_serve.Motor


def test_a_prediction_says_what_the_arithmetic_says(engine: Engine) -> None:
    (found,) = engine.predict([tiny.png(102)])
    logits = tiny.gray_logits(102 / 255)  # (3.2, 2.0), (2.4, 2.0), (1.6, 2.4)
    probability = softmax(logits.mean(axis=0))
    assert (found.label, found.index) == ("bright", 0)
    assert found.probability == pytest.approx(probability[0], abs=1e-6)
    assert [(each.label, each.index) for each in found.top] == [("bright", 0), ("dark", 1)]
    assert [each.probability for each in found.top] == pytest.approx(probability, abs=1e-6)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.disagreement > 0
    assert [each.label for each in found.votes] == ["bright", "bright", "dark"]
    sure = softmax(logits).max(axis=1)
    assert [each.probability for each in found.votes] == pytest.approx(sure, abs=1e-6)


def test_every_form_of_an_image_has_the_same_prediction(engine: Engine, tmp_path: Path) -> None:
    image = Image.effect_noise((21, 13), 90)
    image.save(tmp_path / "noise.png")
    gray = np.asarray(image)
    forms: list[Any] = [
        tmp_path / "noise.png",
        str(tmp_path / "noise.png"),
        (tmp_path / "noise.png").read_bytes(),
        image,
        gray,
        gray[:, :, None],
        np.repeat(gray[:, :, None], 3, axis=2),
        np.dstack([gray, gray, gray, np.full_like(gray, 255)]),
    ]
    found = engine.predict(forms)
    assert found == [found[0]] * len(forms)


def test_many_images_keep_their_order(engine: Engine) -> None:
    values = [*VALUES] * 40  # more than are decoded at a time
    found = engine.predict([tiny.png(value) for value in values])
    assert [each.label for each in found] == [
        "bright" if value > 100 else "dark" for value in values
    ]
    assert engine.predict([]) == []


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        (b"", "empty_image", "image 1: "),
        (b"text", "not_an_image", "image 1: "),
        (np.zeros((8, 8), np.float32), "not_an_image", "float32"),
        (np.zeros((8, 8, 2), np.uint8), "not_an_image", "channels"),
        (np.zeros((0, 8), np.uint8), "not_an_image", "uint8"),
    ],
)
def test_what_is_no_image_is_named(engine: Engine, bad: Any, code: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as error:
        engine.predict([tiny.png(0), bad])
    assert error.value.code == code


def test_a_file_that_is_no_image_is_named(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        engine.predict([tmp_path / "none.png"])
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ImageError, match=r"text\.png: the bytes are not an image"):
        engine.predict([tmp_path / "text.png"])


def test_one_image_in_place_of_a_list_is_refused(engine: Engine) -> None:
    images: list[Any] = ["3.png", Path("3.png"), b"png", Image.new("L", (8, 8))]
    for image in images:
        with pytest.raises(TypeError, match=r"expected a list of images: predict\(\[image\]\)"):
            engine.predict(image)


@pytest.mark.anyio
async def test_it_says_what_the_service_says(path: Path, engine: Engine) -> None:
    from dverge_serve.serving.app import App
    from dverge_serve.serving.settings import Settings
    from dverge_serve.serving.worker import Worker

    large = tiny.encode(Image.effect_noise((200, 90), 90))
    app = App(Worker(Settings(model=path, device="cpu")), expose="full")
    await app.start()
    assert app.worker.loading
    await app.worker.loading
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        for data in (large, *map(tiny.png, VALUES)):
            (said,) = (await client.post("/predict", content=data)).json()["predictions"]
            (found,) = engine.predict([data])
            for key in ("label", "index", "probability", "agreement", "disagreement"):
                assert said[key] == getattr(found, key)
            for key in ("top", "votes"):
                assert [list(each.values()) for each in said[key]] == [
                    [each.label, each.index, each.probability] for each in getattr(found, key)
                ]
    await app.stop()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_it_is_a_model_as_maite_has_it(engine: Engine) -> None:
    pixels = [np.full((1, 8, 8), value, np.uint8) for value in VALUES]
    found = engine(pixels)
    assert len(found) == len(VALUES)
    expected = [softmax(tiny.gray_logits(value / 255).mean(axis=0)) for value in VALUES]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for other in (
        [each / np.float32(255) for each in pixels],
        [torch.from_numpy(each) / 255 for each in pixels],
        (np.stack(pixels) / 255).tolist(),
    ):
        np.testing.assert_allclose(engine(other), found, atol=1e-6)
    assert engine([]) == []
    assert engine.metadata["index2label"] == {0: "bright", 1: "dark"}
    assert engine.metadata["id"] == f"tiny-{engine.sha256[:12]}"


@pytest.mark.parametrize(
    "bad",
    [
        [np.full((1, 8, 8), 2.0)],  # beyond 1
        [np.full((1, 8, 8), np.nan)],
        [np.zeros((1, 8, 9), np.float32)],
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((1, 8, 8), np.int64)],
        [np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 9), np.uint8)],
    ],
)
def test_a_batch_of_another_kind_is_refused(engine: Engine, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|same shape"):
        engine(bad)
