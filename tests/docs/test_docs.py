"""The documentation: references that match the code, a strict build, a walk-through that works."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dverge_serve.cli import run
from tests.docs.reference import FOLDER, pages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_the_reference_is_what_the_code_says(name: str) -> None:
    made = pages()
    assert set(made) == {path.name for path in FOLDER.iterdir()}
    assert (FOLDER / name).read_text() == made[name], "run `make reference`"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built strictly."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "docs"


class Sources(HTMLParser):
    """Collects what a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        name = "href" if tag == "link" else "src"
        if tag != "a" and values.get(name):
            self.found.append(str(values[name]))


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    written = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert written <= built
    for page in site.rglob("*.html"):
        sources = Sources()
        sources.feed(page.read_text())
        assert sources.found
        assert not [source for source in sources.found if re.match(r"(?:https?:)?//", source)], page


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert listed == {
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up photos of two classes in `photos/`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 6)):
        for name, colour in (("cat", (200, 90, 60)), ("dog", (60, 110, 200))):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.normal(0, 40, (24, 36, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path


def commands_of(page: str) -> list[list[str]]:
    """Return the arguments of every `dverge` command in a page's blocks."""
    text = (ROOT / "docs" / page).read_text()
    return [
        shlex.split(line)[1:]
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("dverge ")
    ]


def test_the_walk_through_of_your_own_images(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = commands_of("images.md")
    verbs = [command[0] for command in commands]
    assert verbs == ["train", "export", "verify-robustness", "inspect", "predict", "serve"]
    smaller = ["architecture=resnet8", "width=8", "standard.epochs=1", "dverge.epochs=1"]
    smaller += [
        "data.crop=[8,8]",
        "data.pad=1",
        "batch_size=64",
        "members=2",
        "verification.eps=[0.03]",
    ]
    for command in commands[:-1]:  # tests of its own serve
        if command[0] == "train":
            command += [word for pair in smaller for word in ("--set", pair)]
        # So little data proves little: whatever the verdict, it is one.
        codes = (0, 3) if command[0] == "verify-robustness" else (0,)
        assert run(command) in codes, (command, capsys.readouterr().err)
    told = capsys.readouterr().out
    assert (photos / "model.report.json").exists()
    assert "cat" in told
    assert "dog" in told


def test_every_training_of_the_training_page(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = ["width=8", "standard.epochs=1", "dverge.epochs=1", "dverge.steps=1"]
    smaller += ["data.crop=[16,16]", "batch_size=32", "members=2"]
    commands = commands_of("training.md")
    runs = set()
    for command in commands:
        if "--resume" not in command:
            own = any(word.startswith("architecture=") for word in command)
            pairs = smaller if own else [*smaller, "architecture=resnet8"]
            command += [word for pair in pairs for word in ("--set", pair)]
        assert run(command) == 0, (command, capsys.readouterr().err)
        runs.add(command[command.index("--out") + 1])
    assert len(commands) >= 7
    finished = {path.parent.as_posix() for path in Path().glob("runs/*/checkpoint.json")}
    assert finished - {"runs/latest"} == runs
