"""`benchmarks.attacked_class`: the picture and the counts of one class."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import attacked_class
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from training.data.splits import load_test
from training.runs.directory import Run


def test_counts_and_a_picture(
    tiny_model: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, picture = Run.open_finished(tiny_run), tmp_path / "three.png"
    command = ["attacked_class", str(tiny_model), "3", str(picture), "--run", str(tiny_run)]
    command += ["--surrogates", str(tiny_run), "--eps", "0.3"]
    monkeypatch.setattr(sys, "argv", command)
    attacked_class.main()

    _, split = load_test(run.config.data)
    rows = np.flatnonzero(split.labels.numpy() == 3)
    images = to_float(split.images.numpy()[rows])
    with Engine(tiny_model, device="cpu") as engine:
        right = (engine.run(images).predictions == 3).sum()
    told = capsys.readouterr()
    found = re.search(
        rf"ensemble: of {len(rows)} images of '3', (\d+) right when clean, "
        r"(\d+) after every attack at eps 0\.3",
        told.out + told.err,
    )
    assert found, told
    assert int(found[1]) == right
    assert int(found[2]) < right  # the attacks are on the model's own members
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > drawn.height > 200
