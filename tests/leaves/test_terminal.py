"""Progress on a terminal: nothing is squeezed, however narrow it is."""

from __future__ import annotations

import io
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dverge_serve import progress
from dverge_serve.progress import Progress, fitting

NOTE = "loss 1.407, held-out 0.600, 34 img/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, NOTE),
        (80, "loss 1.407, held-out 0.600"),
        (79, "loss 1.407"),
        (60, ""),
        (64, "loss 1.407"),
        (61, ""),
    ],
)
def test_a_narrow_terminal_shows_fewer_figures_and_whole_ones(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(Progress, "shown", True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("dverge training, 3 members", 10) as done:
        done.advance(10, NOTE)
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    last = [line for line in lines if "100%" in line][-1]
    assert "left 0:00:00" in last
    assert last.split("left 0:00:00")[1].split("\x1b")[0].strip() == shown
    assert "…" not in last


def test_while_one_unit_takes_long_lines_name_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    before = threading.active_count()
    with Progress("attacking", 10) as shown:
        shown.advance(5, "one")
        shown.advance(0, "two")
        deadline = time.monotonic() + 10
        told = ""
        while told.count("two") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            told += capsys.readouterr().err
    assert "attacking:  50%, " in told
    assert told.count(" left, two\n") >= 2
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@given(note=st.text(st.characters(codec="ascii"), max_size=60), room=st.integers(0, 80))
def test_what_fits_is_a_beginning_and_fits(note: str, room: int) -> None:
    found = fitting(note, room)
    assert note.startswith(found)
    assert len(found) <= room
