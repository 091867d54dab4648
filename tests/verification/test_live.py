"""Attacking a live service over real HTTP: requests, their count, and the report's section."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dverge_serve.cli.tables import live_line
from dverge_serve.engine.live_report import Live
from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from dverge_serve.progress import Progress
from tests.verification.models import Linear, TorchEngine, linear_split
from training.recipe import load_recipe
from verification.attacks.outcomes import Outcomes
from verification.live import Caller, _Attacked, _by_queries, attack_service
from verification.service_client import Service

EPS = 0.05


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms
    engine = TorchEngine([Linear()])
    full = True
    count = 0
    busy = 0  # requests to answer 503 first
    busy_at = 0  # the number of one more
    watch = ""  # `observe` or `refuse` the queries after `budget`
    budget = 0
    hangs_up = False  # after every answer, without saying so

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with Image.open(io.BytesIO(body)) as image:
            pixels = to_float(np.asarray(image)[None, None])
        type(self).count += 1
        scores = self.engine.run_all(pixels)
        index = int(scores.predictions[0])
        answer: dict[str, Any] = {"label": str(index), "index": index}
        if self.full:
            answer["top"] = [
                {"index": at, "probability": float(scores.probabilities[0, at])} for at in (0, 1)
            ]
        allowed = self.headers.get("authorization") == "Bearer secret"
        text = json.dumps({"predictions": [answer]}).encode()
        busy = type(self).busy > 0
        type(self).busy -= busy
        busy |= type(self).count == self.busy_at
        over = bool(self.watch) and self.count > self.budget
        if over and self.watch == "refuse":
            text = b'{"error":{"code":"near_copies","message":"too many"}}'
        self.send_response(
            503 if busy else 429 if over and self.watch == "refuse" else 200 if allowed else 401
        )
        if over and self.watch == "observe":
            self.send_header("X-Near-Copies", "51")
        self.send_header("X-Model-Sha256", "abc")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.close_connection = self.hangs_up

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.count, Handler.full, Handler.hangs_up = 0, True, False
    Handler.busy, Handler.busy_at, Handler.watch = 0, 0, ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


CALLER = Caller(
    linear_split([40, 90, 150, 220, 100, 180]), load_recipe("digits", {"width": 8}), seed=0
)


def outcome(values: list[int]) -> Outcomes:
    split = linear_split(values)
    found = Outcomes({}, np.ones(len(values), bool), np.zeros(len(values), bool))
    images = split.images.numpy().astype(int)
    images[0] += 12  # the first transferred image crosses the line
    found.worst[EPS, "transfer"] = images.astype(np.uint8)
    return found


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("kept", "broken"), [(129, 1), (200, 0)])  # margins of 1.5 and 72.5 steps
def test_it_counts_its_requests_and_reports_what_was_exposed(
    url: str, full: bool, kept: int, broken: int
) -> None:
    values = [120, kept, 250, 5]
    with Service(url, 2, requests=240, rate=1e6, token="secret") as service:
        Handler.full = full
        live = attack_service(service, linear_split(values), outcome(values), "abc", EPS, CALLER)
    assert live["requests"] == Handler.count <= 240
    assert live["same_model"] is True
    assert live["exposed"] == (["index", "label", "top"] if full else ["index", "label"])
    assert live["exposure"] == ("scores" if full else "label")
    assert live["clean_accuracy"]["value"] == 1.0
    assert live["transfer"]["value"] == 0.75
    told = "scores" if full else "labels"
    stolen, asked = live["substitute"], live["by_queries"]
    assert (stolen["answers"], stolen["queries"]) == (told, 60)
    assert stolen["robust"]["n"] == 4
    assert stolen["robust"]["value"] <= 1 - 0.25 * broken - 0.25  # 120 breaks, and so does 129
    assert (asked["attack"], asked["answers"]) == ("square" if full else "rays", told)
    assert asked["queries"] == Handler.count - 4 - 4 - 60 - 4
    assert asked["broken"] in (0, 1, 1 + broken)
    assert 1 <= asked["images"] <= 4
    assert asked["queries_each_at_most"] == (100 if full else 168)
    line = live_line(Live.from_json(live))
    assert "100.0% clean; at eps 0.05 75.0% transferred" in line
    assert f"from a substitute trained on its {told} (60 queries)" in line
    assert f"{Handler.count} requests" in line
    assert line.endswith("it exposes scores: index, label, top" if full else "label: index, label")
    assert "ANOTHER" not in line
    assert "ANOTHER" in live_line(Live.from_json(live | {"same_model": False}))


def by_queries(url: str, requests: int, values: list[int], eps: float) -> dict[str, Any]:
    """Attack by queries alone, after one request that tells what the service exposes."""
    split = linear_split(values)
    with (
        Service(url, 2, requests=requests, rate=1e6, token="secret") as service,
        Progress("attacking", requests) as progress,
    ):
        live = _Attacked(service, progress)
        live.labels(split.images.numpy()[:1])
        return _by_queries(live, split, eps, CALLER)


@pytest.mark.parametrize("full", [True, False])
def test_a_wrong_answer_outside_the_ball_is_no_break(url: str, full: bool) -> None:
    Handler.full = full
    for requests in range(11, 21):  # a search by labels may end on either answer
        found = by_queries(url, requests, [90, 100, 160, 170], 1 / 255)
        assert (found["images"], found["broken"]) == (1, 0)


@pytest.mark.parametrize("full", [True, False])
def test_a_busy_service_costs_no_more_than_the_image_that_has_no_requests_left(
    url: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verification.service_client.time.sleep", lambda seconds: None)
    Handler.full = full
    each = 100 if full else 200
    requests = 1 + 2 * each
    assert by_queries(url, requests, [20, 250], 1 / 255)["images"] == 2
    Handler.count, Handler.busy_at = 0, requests - 3
    found = by_queries(url, requests, [20, 250], 1 / 255)
    assert (found["images"], found["broken"], found["queries"]) == (1, 0, 2 * each)
    assert Handler.count == requests


@pytest.mark.parametrize("full", [True, False])
def test_a_watch_that_sees_the_queries_is_reported_with_their_number(url: str, full: bool) -> None:
    each = 100 if full else 200
    Handler.full, Handler.watch, Handler.budget = full, "observe", 31
    found = by_queries(url, 1 + 2 * each, [20, 250], 1 / 255)
    assert (found["images"], found["flagged_images"], found["refused"]) == (2, 2, 0)
    assert found["flagged_after"] == 0  # of the second image the first query is marked already
    assert found["queries"] == 2 * each
    Handler.count, Handler.watch, Handler.budget = 0, "refuse", 31
    found = by_queries(url, 1 + 2 * each, [20], 1 / 255)
    assert (found["images"], found["broken"], found["queries"]) == (1, 0, 31)
    assert (found["flagged_images"], found["flagged_after"], found["refused"]) == (1, 30, 1)
    Handler.count, Handler.watch = 0, ""
    found = by_queries(url, 1 + each, [20], 1 / 255)
    assert (found["flagged_images"], found["flagged_after"], found["refused"]) == (0, None, 0)


def test_a_refusal_outside_of_these_queries_is_a_users_error(url: str) -> None:
    Handler.watch, Handler.budget = "refuse", 0
    with (
        Service(url, 2, rate=1e6, token="secret") as service,
        pytest.raises(UserError, match=r"near-copies of one image.*DVERGE_WATCH_BUDGET"),
    ):
        service.scores(linear_split([10]).images.numpy())


def test_the_budget_and_the_rate_hold(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("verification.service_client.time.sleep", slept.append)
    monkeypatch.setattr("verification.service_client.time.monotonic", lambda: 10.0)
    with Service(url, 2, requests=3, rate=4.0, token="secret") as service:
        images = linear_split([10, 20, 30]).images.numpy()
        service.scores(images)
        assert slept == [0.0, 0.25, 0.25]
        with pytest.raises(UserError, match="3 requests is spent"):
            service.scores(images[:1])
    assert Handler.count == 3


def test_a_busy_service_is_asked_again_later(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("verification.service_client.time.sleep", slept.append)
    images = linear_split([10]).images.numpy()
    with Service(url, 2, rate=1e6, token="secret") as service:
        Handler.busy = 2
        assert service.scores(images).shape == (1, 2)
        assert (service.asked, Handler.count) == (3, 3)  # all of them counted
        assert [each for each in slept if each >= 1] == [1.0, 2.0]
        Handler.busy = 9
        with pytest.raises(UserError, match="answered 503"):
            service.scores(images)


def test_a_connection_that_was_hung_up_while_idle_is_opened_again(url: str) -> None:
    Handler.hangs_up = True
    with Service(url, 2, rate=1e6, token="secret") as service:
        for _ in range(3):
            service.scores(linear_split([10]).images.numpy())
            time.sleep(0.05)
    assert Handler.count == 3


def test_a_service_that_refuses_or_is_not_there_is_a_users_error(url: str) -> None:
    images = linear_split([10]).images.numpy()
    with (
        Service(url, 2, token="wrong") as service,
        pytest.raises(UserError, match="DVERGE_TOKEN"),
    ):
        service.scores(images)
    with pytest.raises(UserError, match="http://host:port"):
        Service("ftp://somewhere", 2)
    with pytest.raises(UserError, match="a port"):
        Service("http://somewhere:99999", 2)
    nobody = Service("http://127.0.0.1:9", 2)
    with pytest.raises(UserError, match="a running service"):
        nobody.scores(images)
