"""A real browser: Debian's Chromium, driven by Playwright, and models whose answers are known."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dverge_serve.engine.report import report_path
from dverge_serve.files import sha256
from dverge_serve.serving import pages
from tests.serving import tiny
from tests.serving.server import Server, serving

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
EVIL = "<script>alert(1)</script>"
LONG = "Anunbrokenlabelmuchwiderthanatelephone" * 3
TOKEN = "s3cret"

Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a module; it ends with it, for its event loop keeps out all others."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no Chromium is installed ({', '.join(CHROMIUM)}): pages are not looked at")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a page; it must ask no other host, raise no error and break no rule of its policy.

    With `DVERGE_SCREENSHOTS=FOLDER` every page is photographed as the test left it.
    """
    contexts, troubles, asked = [], [], []

    def opened(url: str, *, width: int = 1100, height: int = 900, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(f"a dialog: {dialog.message}"))
        page.on("console", lambda line: _note(line, troubles))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        return page

    yield opened
    folder = os.environ.get("DVERGE_SCREENSHOTS")
    for number, context in enumerate(contexts):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = f"{tmp_path.name.removeprefix('test_')}-{number}.png"
            context.pages[0].screenshot(path=Path(folder) / name, full_page=True)
        context.close()
    assert not troubles
    hosts = {url.split("/")[2] for url in asked if not url.startswith(("data:", "blob:"))}
    assert all(host.startswith("127.0.0.1:") for host in hosts), hosts


def _note(line: Any, troubles: list[str]) -> None:
    # Chromium reports refusals of the service here, too; the page shows those itself.
    if line.type in ("error", "warning") and "Failed to load resource" not in line.text:
        troubles.append(line.text)


def examples() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the page's ten digits, `[10, 64]` in [0, 1]."""
    folder = Path(pages.__file__).parent / "templates" / "examples"
    found = []
    for digit in range(10):
        with Image.open(folder / f"{digit}.png") as image:
            found.append(np.asarray(image, dtype=np.float32).ravel() / np.float32(255))
    return np.stack(found)


def save_digits_model(path: Path) -> None:
    """Write a model that names the example nearest to an image, with a report.

    Half way between a 5 and a 6 the first member leans to 5, the others to 6.
    """
    known = examples()
    weights = np.tile(2 * known, (3, 1, 1)).reshape(3, 10, 1, 8, 8)
    bias = np.tile(-(known**2).sum(axis=1), (3, 1))
    bias[0, 5] += 2
    bias[1:, 6] += 2
    labels = tuple("0123456789")
    digest = tiny.save_linear_model(path, weights, bias, labels, name="digits", dataset="digits")
    report = tiny.save_report(path, digest)
    folder = Path(pages.__file__).parent / "templates" / "examples"
    three, five = (base64.b64encode((folder / f"{n}.png").read_bytes()).decode() for n in (3, 5))
    attacked = {"label": "3", "clean": three, "attacked": five, "answer": "3"}
    images = [attacked | {"control_answer": "8"}, attacked | {"control_answer": EVIL}]
    report["examples"] = {"eps": 0.1, "images": images}
    report_path(path).write_text(json.dumps(report))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An open server of the digits model, which shows all."""
    folder = tmp_path_factory.mktemp("digits")
    save_digits_model(folder / "model.onnx")
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a token that shows scores alone, its model's names chosen by an enemy."""
    folder = tmp_path_factory.mktemp("guarded")
    path = folder / "model.onnx"
    tiny.save_gray_model(path, labels=(EVIL, LONG), name=EVIL, dataset=EVIL)
    report = tiny.save_report(path, sha256(path.read_bytes()))
    report["robust_accuracy"][0]["transfer"]["value"] = EVIL
    with serving(folder, DVERGE_TOKEN=TOKEN, DVERGE_EXPOSE="scores") as server:
        yield server
