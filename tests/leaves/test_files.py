"""Files that are whole or not there, and errors of one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dverge_serve.errors import Exit, NotMetError, UserError, nearest
from dverge_serve.files import (
    atomic_path,
    canonical_json,
    pretty_json,
    read_json,
    sha256,
    write_atomic,
)
from dverge_serve.progress import Progress, duration, say


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_write_makes_the_folder_and_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    write_atomic(path, b"long old content")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_new_files_have_the_modes_of_ordinary_ones(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


class Broken(Exception):  # noqa: N818
    """Something that goes wrong in the middle of writing."""


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic_path(path) as part:
        part.write_bytes(b"half of the n")
        raise error


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt, SystemExit, ValueError])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(kind):
        write_half(path, kind)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_new_file_that_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        write_half(tmp_path / "file", Broken)
    assert names(tmp_path) == []


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([level]) * 200_000 for level in range(2)]
    write_atomic(path, contents[0])
    stop, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            data = path.read_bytes()
            seen.add(data[:1])
            if data not in contents:
                wrong.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        write_atomic(path, contents[turn % 2])
    stop.set()
    reader.join()
    assert not wrong
    assert seen


def test_a_process_killed_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys, pathlib; from dverge_serve.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)])
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write_bytes", "mkdir", "replace", "chmod"])
def test_a_full_disk_is_one_line_and_the_old_file_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, where, full)
        with pytest.raises(UserError, match=r"no space left on the disk .*model\.onnx") as caught:
            write_atomic(path, b"new")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


def test_a_full_disk_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [1_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room[0]))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"file \(1,234 bytes, 1,000 free: 234 missing\);"):
        write_atomic(tmp_path / "file", b"x" * 1_234)
    room[0] = 5_000  # the user's quota is full, not the disk
    with pytest.raises(UserError, match=r"file \(1,234 bytes\);"):
        write_atomic(tmp_path / "file", b"x" * 1_234)


def test_a_disk_that_fills_up_when_flushed_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dverge_serve.files.os.fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_atomic(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*a folder that can be written") as caught:
        write_atomic(tmp_path / "file" / "below", b"new")
    assert caught.value.exit_code == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "folder", b"new")
    assert names(tmp_path) == ["file", "folder"]


def test_hashes_are_sha256() -> None:
    assert sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


@given(values)
def test_json_comes_back_and_has_one_canonical_spelling(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value
    assert json.loads(pretty_json(value)) == value
    again = json.loads(pretty_json(value))
    assert canonical_json(again) == canonical_json(value)
    assert canonical_json(value).isascii()


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1})
    assert canonical_json({"b": 1, "a": [1, 2]}) == b'{"a":[1,2],"b":1}'
    assert pretty_json({"ü": 1}).decode().endswith("\n")
    with pytest.raises(ValueError, match="JSON"):
        pretty_json(float("nan"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"nothing"])
def test_json_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*some\.json.*expected a report") as caught:
        read_json(path, "a report")
    assert caught.value.exit_code == 2


@given(st.text(), st.text(), st.text())
def test_a_user_error_is_always_one_line(found: str, expected: str, next_step: str) -> None:
    error = UserError(found, expected, next_step)
    assert len(str(error).splitlines()) <= 1
    assert (error.found, error.expected, error.next_step) == (found, expected, next_step)


def test_a_user_error_says_found_expected_and_next() -> None:
    assert str(UserError("port 80", "a free port", "give --port")) == (
        "port 80; expected a free port; give --port"
    )
    assert str(UserError("port 80")) == "port 80"
    assert str(UserError("port 80", next_step="give --port")) == "port 80; give --port"
    assert int(UserError("x").exit_code) == 2
    assert int(NotMetError("x").exit_code) == 1
    assert {code.name: int(code) for code in Exit} == {
        "DONE": 0,
        "NOT_MET": 1,
        "USER": 2,
        "NOT_VALID": 3,
        "BUG": 70,
        "INTERRUPTED": 130,
    }


def test_the_nearest_option_is_suggested() -> None:
    assert nearest("epoch", ["epochs", "lr"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["lr", "epochs"]) == "known: epochs, lr"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "shown", True)


class Clock:
    """A clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("dverge_serve.progress.time.monotonic", lambda: self.now)


@pytest.mark.usefixtures("shown")
def test_progress_off_a_terminal_is_plain_lines_with_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("training", 100) as progress:
        for _ in range(50):
            clock.now += 1
            progress.advance(1, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training:   5%, 1m 35s left, loss 0.5"
    assert len(lines) == 10 + 1
    assert lines[-2] == "training:  50%, 50s left, loss 0.5"
    assert lines[-1] == "training: done in 50s"


@pytest.mark.usefixtures("shown")
def test_a_note_stands_until_the_next_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("training", 100) as progress:
        progress.advance(0, "loss 0.9")
        clock.now += 6
        progress.advance(3)
    assert "3%, 3m 14s left, loss 0.9" in capsys.readouterr().err


@pytest.mark.usefixtures("shown")
def test_time_left_of_a_resumed_task_is_of_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("training", 100, start=80) as progress:
        clock.now += 10
        progress.advance(10)
    assert "90%, 10s left" in capsys.readouterr().err


def test_nothing_is_shown_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Progress, "shown", False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("training", 100) as progress:
        clock.now += 10
        progress.advance(10)
    say("a line about the work")
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    code = (
        "from dverge_serve.progress import Progress, say, show\n"
        "for turn in (str, show):\n"
        "    turn()\n"
        "    say('a line about the work')\n"
        "    with Progress('training', 1): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["a line about the work", "training: done in 0s"]
    assert done.stdout == ""


@pytest.mark.usefixtures("shown")
def test_a_task_that_fails_does_not_say_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Broken), Progress("training", 3):
        raise Broken
    assert "done" not in capsys.readouterr().err


@pytest.mark.usefixtures("shown")
def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("training", 4) as progress:
        progress.advance(3, "loss 0.5")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "training" in shown
    assert "75%" in shown
    assert "loss 0.5" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (125, "2m 05s"),
        (3599.7, "1h 00m"),
        (7261, "2h 01m"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words
