"""The members that the project offers: the files that the page `docs/model-zoo.md` describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dverge_serve.engine.report import Report
from export.published_checkpoint import read_published

ROOT = Path(__file__).parents[2]
FIRST = ROOT / "examples" / "zoo" / "cifar10-dverge-3xresnet20.safetensors"
SECOND = FIRST.parent / "36-epochs" / FIRST.name
PAGE = (ROOT / "docs" / "model-zoo.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [FIRST, SECOND], ids=["18 epochs", "36 epochs"])
def test_the_page_describes_the_file_and_it_is_read(file: Path) -> None:
    found = read_published(file)
    assert found.sha256 in PAGE
    assert (len(found.members), str(found.resnet)) == (3, "resnet20 of width 16")
    assert found.method == "dverge"  # as a surrogate it would else count as undefended
    assert found.resnet.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-6)
    answers = {int(member(torch.full((1, 3, 32, 32), 0.5)).argmax()) for member in found.members}
    assert all(0 <= answer < found.resnet.classes for answer in answers)
    assert file.stat().st_size < 2_000_000


@pytest.mark.parametrize("file", [FIRST, SECOND], ids=["18 epochs", "36 epochs"])
def test_the_report_is_of_the_file(file: Path) -> None:
    report = Report.load(file.with_suffix(".report.json"))
    assert report.verdict == "VALID"
    assert report.model.weights_sha256 == read_published(file).sha256


def test_the_page_tells_what_the_report_of_the_second_file_says() -> None:
    report = Report.load(SECOND.with_suffix(".report.json"))
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| .0")]
    told = {float(row[1]): [float(cell.split()[0]) for cell in row[2:4]] for row in rows}
    assert told == {
        eps: [round(100 * rate.value, 1) for rate in (at.transfer, at.white_box) if rate]
        for eps, at in report.robust_accuracy.items()
    }
