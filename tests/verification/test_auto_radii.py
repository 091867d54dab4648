"""Radii by search: where an undefended control falls to half of its accuracy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from dverge_serve.progress import Progress
from tests.verification.models import Linear, linear_split
from training.runs.directory import Run
from verification.auto_radii import control_and_sources, halving_radii
from verification.gradients import ready
from verification.surrogate import Origin, opened


class Deaf(Linear):
    """Answers by pixels that no attack may change so far."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return super().score(x).detach() * 0 + 1.0


# Images this many 8-bit steps from the threshold, which lies between 127 and 128.
NEAR, FAR = [124, 131, 120, 135], [60, 195, 40, 215]


def test_the_control_is_halved_at_the_radius_in_the_middle() -> None:
    split = linear_split(NEAR + FAR)
    sources: list[list[torch.nn.Module]] = [[Linear(scale=5.0)], [Deaf()]]
    half, whole, twice = halving_radii([Linear()], sources, split, "linf", 0)
    assert whole == 8 / 255  # the four near images, 3.5 and 7.5 steps away, have crossed
    assert (half, twice) == (4 / 255, 16 / 255)


def test_the_smallest_radius_is_one_step() -> None:
    split = linear_split([127, 128, 127, 128])
    assert halving_radii([Linear()], [[Linear()]], split, "linf", 0) == (1 / 255, 2 / 255)


def test_few_radii_are_tried_where_a_small_one_halves_the_control(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    split = linear_split(NEAR + FAR)
    halving_radii([Linear()], [[Linear()]], split, "linf", 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying" in line]
    tried = [round(255 * float(line.rpartition(" ")[2])) for line in lines]
    assert tried == [1, 2, 4, 8, 6, 7]


def test_fewer_images_are_used_if_so_asked() -> None:
    split = linear_split([124, *[60] * 7, 131])  # the first and the last
    assert halving_radii([Linear()], [[Linear()]], split, "linf", 0, 2)[1] == 4 / 255


def test_the_control_is_not_attacked_from_its_own_weights_unless_there_are_no_others(
    tiny_run: Path,
) -> None:
    run, cpu = Run.open_finished(tiny_run), torch.device("cpu")
    (own,) = opened({"own": (0, 1, 2)}, Origin.of_run(run), run.members(), cpu)
    strange: Any = SimpleNamespace(members=[Linear()], shares=lambda _: False)
    strange.undefended, strange.networks = False, frozenset()
    control, sources = control_and_sources(None, [own, strange], run.config, cpu)
    assert (len(control), sources) == (3, [strange.members])
    control, sources = control_and_sources(None, [own], run.config, cpu)
    assert sources == [control]
    control, sources = control_and_sources(run, [own], run.config, cpu)  # its undefended members
    assert sources == [own.members]
    found = state_dict(control)
    assert all(
        torch.equal(found[key], value)
        for key, value in state_dict(
            [ready(member, cpu) for member in run.members("standard")]
        ).items()
    )


def state_dict(members: Any) -> dict[str, torch.Tensor]:
    return torch.nn.ModuleList(members).state_dict()


def test_l2_radii_are_lengths() -> None:
    split = linear_split(NEAR + FAR)
    radii = halving_radii([Linear()], [[Linear()]], split, "l2", 0)
    assert radii == pytest.approx([8 / 255 * n for n in (4, 8, 16)])  # of 64 pixels


def test_a_control_that_never_falls_is_told() -> None:
    split = linear_split([200, 210])
    with pytest.raises(UserError, match="`eps` auto: the control keeps more than half"):
        halving_radii([Deaf()], [[Deaf()]], split, "linf", 0)
