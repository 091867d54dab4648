"""The documentation: references that match the code, a strict build, examples that work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image

from dverge_serve import __version__
from dverge_serve.cli import run
from tests.docs.reference import FOLDER, pages
from tests.training.published import nets, table
from training.runs.directory import Run

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FOLDERS = "benchmarks|deploy|docs|dverge_serve|examples|export|tests|training|verification"
SMALL = {
    "width": 8,
    "standard.epochs": 1,
    "dverge.epochs": 1,
    "data.train_limit": 320,
    "data.test_limit": 32,
}


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
    listed = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert listed == {
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    missing = [
        path
        for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text)
        if not (ROOT / path).exists()
    ]
    assert not missing


def test_every_link_of_a_page_in_the_root_leads_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
            assert (ROOT / link).exists(), (page.name, link)


def test_every_test_that_the_serving_page_names_is_there() -> None:
    rows = re.findall(
        r"^\|.*`test_\w+\.py.*$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 20
    for row in rows:
        file = ""
        for name in re.findall(r"`([\w.:]+)`", row.rpartition(" | ")[2]):
            known, _, test = name.partition("::")
            file = known if known.endswith(".py") else file
            code = (ROOT / "tests" / "serving" / file).read_text()
            assert f"def {test or name.replace('..._', 'test_')}(" in code or file == name, name


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    paper = citation["references"][0]
    for text in (ROOT / "README.md", ROOT / "docs" / "concepts.md"):
        assert paper["url"] in text.read_text()


def python_of(text: str) -> str:
    """Return the Python blocks of a text, in order."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def with_root() -> str:
    """Return a PYTHONPATH with this checkout first, for another process."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def run_python(code: str, folder: Path) -> None:
    """Run code as a user does, in a process and a folder of its own; warnings are errors."""
    (folder / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": with_root()}
    command = [sys.executable, "-W", "error", "example.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("title", ["An architecture", "A method", "An attack", "A gate"])
def test_the_examples_of_the_extension_guide(title: str, tmp_path: Path) -> None:
    sections = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
    (section,) = [section for section in sections if section.startswith(f"{title}\n")]
    assert len(sections) == 4
    code = python_of(section)
    assert "assert " in code
    run_python(code, tmp_path)


def test_the_python_example_of_the_readme_and_of_the_reference(tmp_path: Path) -> None:
    code = python_of((ROOT / "README.md").read_text())
    assert code in (FOLDER / "python.md").read_text()
    smaller = code.replace('load_recipe("digits")', f'load_recipe("digits", {SMALL})')
    assert smaller != code
    shutil.copy(ROOT / "dverge_serve/serving/templates/examples/3.png", tmp_path)
    run_python(smaller, tmp_path)
    assert (tmp_path / "model.report.json").exists()


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", with_root())
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert re.search(r"transfer [01]\.\d+", printed)


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
        for line in block.replace("\\\n", "").splitlines()
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
        "weights=",  # nothing is downloaded
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
    smaller += ["transfer.epochs=1", "data.crop=[16,16]", "batch_size=24", "members=2"]
    smaller += ["standard.lr=0.01", "dverge.lr=0.01"]  # the recipes' are for larger batches
    # 72 images: no batch is small, where BatchNorm would see few values of a map of 1x1 in bf16.
    smaller += ["precision=fp32"]
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


def test_the_training_of_the_model_zoo_starts_from_published_members(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "photos").rename("FOLDER")
    made = table(nets(3, blocks=3, classes=2))
    torch.save(made, "official_baseline_3xresnet20.pth", _use_new_zipfile_serialization=False)
    command, ours = [each for each in commands_of("model-zoo.md") if each[0] == "train"]
    assert (ROOT / ours[ours.index("--start") + 1]).is_file()
    smaller = ["width=4", "dverge.epochs=1", "batch_size=32", "data.crop=[8,8]", "data.pad=1"]
    command += [word for pair in smaller for word in ("--set", pair)]
    assert run(command) == 0, capsys.readouterr().err
    trained = Run(Path("runs/latest").resolve())
    assert '"stage":"standard"' not in (trained.path / "metrics.jsonl").read_text()
    assert trained.checkpoint["start"][0]["file"] == "official_baseline_3xresnet20.pth"
    for each in (*trained.members("standard"), *trained.members()):
        assert each.mean.flatten().tolist() == pytest.approx([0.3] * 3)  # the file's
