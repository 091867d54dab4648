"""Attacking our own service as it really runs: `dverge serve` in a process of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dverge_serve.cli.tables import live_line
from dverge_serve.engine.live_report import Live
from dverge_serve.engine.session import Engine
from tests.serving.server import Server, clean_environment, free_port
from training.data.splits import Split, load_test, load_training
from training.recipe import load_recipe
from verification.attacks.gradient_attack import Noise
from verification.attacks.outcomes import Outcomes
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.live import Caller, attack_service, chosen
from verification.service_client import Service

EPS, REQUESTS = 0.5, 240
NOISE = Noise(name="noise", threat="transfer", source="none")


@contextmanager
def served(model: Path, folder: Path, **settings: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "dverge_serve", "serve", str(model), "--port", str(port)]
    server = Server(folder, command, port, clean_environment(**settings))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def attacked(tiny_model: Path) -> tuple[Engine, Split, Outcomes]:
    """The model file, 64 digits, and noise where transferred images would be."""
    engine = Engine(tiny_model, device="cpu")
    _, split = load_test(load_recipe("digits", {"data.test_limit": 64}).data)
    outcome = run_suite([NOISE], {}, {"m": Target(engine, None)}, split, [EPS], seed=0)["m"]
    return engine, split, outcome


@pytest.mark.parametrize("exposure", ["label", "scores", "full"])
def test_a_real_service_answers_as_its_file_and_says_what_it_exposes(
    exposure: str, tiny_model: Path, attacked: tuple[Engine, Split, Outcomes], tmp_path: Path
) -> None:
    engine, split, outcome = attacked
    with served(tiny_model, tmp_path, DVERGE_EXPOSE=exposure, DVERGE_TOKEN="secret") as server:
        with Service(server.url, 10, requests=REQUESTS, rate=1e6, token="secret") as service:
            config = load_recipe("digits", {"width": 8})
            caller = Caller(load_training(config.data).holdout, config, seed=0)
            live = attack_service(service, split, outcome, engine.sha256, EPS, caller)
        headers = {"authorization": "Bearer secret"}
        counted = httpx.get(f"{server.url}/metrics", headers=headers).text
    assert (live["same_model"], live["exposure"]) == (True, exposure)
    assert ("agreement" in live["exposed"]) is (exposure == "full")
    assert ("probability" in live["exposed"]) is (exposure != "label")
    # Whatever the file answers rightly, the service does: the same decoder and the same engine.
    asked = chosen(len(split), REQUESTS, seed=0)
    assert live["clean_accuracy"]["value"] == outcome.clean[asked].mean()
    survived = outcome.robust([NOISE], EPS, ["delivered"])[asked]
    assert live["transfer"]["value"] == survived.mean()
    # Callers who see labels alone break images too: by labels, and from a stolen substitute.
    asked, stolen = live["by_queries"], live["substitute"]
    assert asked["attack"] == ("rays" if exposure == "label" else "square")
    assert {asked["answers"], stolen["answers"]} == {"labels" if exposure == "label" else "scores"}
    assert asked["broken"] >= 1
    assert stolen["queries"] == REQUESTS // 4
    answered = re.findall(r"dverge_predictions_total\{[^}]*\} (\S+)", counted)
    assert live["requests"] == sum(map(float, answered)) <= REQUESTS


@pytest.mark.parametrize("mode", ["observe", "refuse"])
def test_its_watch_sees_the_queries_and_the_report_says_so(
    mode: str, tiny_model: Path, attacked: tuple[Engine, Split, Outcomes], tmp_path: Path
) -> None:
    engine, split, outcome = attacked
    settings = {"DVERGE_WATCH": mode, "DVERGE_WATCH_BUDGET": "10"}
    eps = 2 / 255  # nothing breaks, so that all queries are spent
    outcome.worst[eps, "transfer"] = outcome.worst[EPS, "transfer"]
    with (
        served(tiny_model, tmp_path, **settings) as server,
        Service(server.url, 10, requests=REQUESTS, rate=1e6, token="") as service,
    ):
        config = load_recipe("digits", {"width": 8})
        caller = Caller(load_training(config.data).holdout, config, seed=0)
        live = attack_service(service, split, outcome, engine.sha256, eps, caller)
    asked = live["by_queries"]
    assert asked["images"] >= asked["flagged_images"] >= 1
    assert 8 <= asked["flagged_after"] <= 60
    assert asked["refused"] == (asked["flagged_images"] if mode == "refuse" else 0)
    what = f"refused {asked['refused']}" if mode == "refuse" else f"saw {asked['flagged_images']}"
    assert f"(its watch {what} of them, after" in live_line(Live.from_json(live))
