"""A small model and its report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dverge_serve.engine.provenance import provenance_path
from tests.verification.models import shorter
from verification import Report, pipeline, verify
from verification.attacks import presets
from verification.attacks.attack import Attack
from verification.substitute import Substitute, steal

EPS = (0.03, 0.3)


@pytest.fixture(scope="package")
def short() -> Iterator[None]:
    """The whole preset with fewer steps: what is tested here is not the attacks' strength."""

    def fewer(*positional: Any, **named: Any) -> list[Attack]:
        return [shorter(attack, 5, 20) for attack in whole(*positional, **named)]

    def asking_less(*positional: Any, **named: Any) -> Substitute:
        return steal(*positional, **named | {"queries": 40})

    whole = presets.suite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "suite", fewer)
        patch.setattr(pipeline, "steal", asking_less)
        yield


@pytest.fixture(scope="package")
def evaluated(
    short: None, tiny_model: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    model = tmp_path_factory.mktemp("verify") / "model.onnx"
    shutil.copy(tiny_model, model)
    shutil.copy(provenance_path(tiny_model), provenance_path(model))
    return model, verify(model, run=tiny_run, eps=EPS, device="cpu")
