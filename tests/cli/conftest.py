"""A picture, and a model with a report, that the commands are given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dverge_serve.engine.report import report_path
from tests.serving import tiny
from tests.verification.report.test_page import table


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(path)
    return path


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """A model with a whole report about it."""
    model = tmp_path / "gray.onnx"
    about = table() | {"model": table()["model"] | {"sha256": tiny.save_gray_model(model)}}
    report_path(model).write_text(json.dumps(about))
    return model
