"""The report's page: it fetches nothing, runs nothing, and no name in it is ever markup."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from dverge_serve.engine.report import Report
from verification.report import plots
from verification.report.page import _words, page

PNG = b"\x89PNG\r\n\x1a\n"


def rate(value: float) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "n": 100}


def by_queries(answers: str) -> dict[str, Any]:
    attack = "square" if answers == "scores" else "rays"
    points = [(10, 0.94), (100, 0.9), (1000, 0.6)]
    return {
        "eps": 0.1,
        "answers": answers,
        "median": 83.0 if answers == "labels" else None,
        "points": [{"queries": q, "attack": attack, **rate(value)} for q, value in points],
    }


def table(verdict: str = "VALID", white_box: bool = True, name: str = "model.onnx") -> Any:
    attacks = {"noise": 0.9}
    held = (
        rate(0.7)
        | {"of_clean_correct": 0.75, "float": 0.7, "delivered": 0.7}
        | {"attacks": attacks}
    )
    row = {"eps": 0.1, "transfer": held, "white_box": held if white_box else None, "all": held}
    area = {"value": 0.9, "low": 0.8, "high": 1.0, "clean": 90, "attacked": 10}
    return {
        "schema_version": 1,
        "verdict": verdict,
        "preset": "quick",
        "model": {
            "file": name,
            "sha256": "0" * 64,
            "name": "<script>alert(1)</script>",
            "members": 3,
            "precision": "fp32",
            "weights_sha256": "4" * 64,
            "gradients": "run",
        },
        "threat_model": {"norm": "Linf", "eps": [0.1]},
        "data": {
            "name": "d",
            "part": "test",
            "n": 100,
            "sha256": "1" * 64,
            "train_sha256": "2" * 64,
            "training_known": True,
        },
        "clean_accuracy": rate(0.95),
        "robust_accuracy": [row],
        "by_queries": [by_queries(answers) for answers in ("scores", "labels")],
        "substitute": {
            "answers": "scores",
            "queries": 900,
            "seeds": 144,
            "members": 2,
            "architecture": "resnet8",
            "weights_sha256": "6" * 64,
            "agreement": 0.955,
            "robust_accuracy": [{"eps": 0.1, **rate(0.8)}],
        },
        "control": {"what": "own", "clean_accuracy": rate(0.95), "robust_accuracy": [row]},
        "against": {
            "file": "other.onnx",
            "sha256": "5" * 64,
            "clean_accuracy": rate(0.93),
            "robust_accuracy": [row],
            "comparison": [
                {"what": "clean", "eps": 0.0, "only_this": 3, "only_other": 1, "p_value": 0.625}
            ],
        },
        "gates": [
            {"name": "finite", "passed": True, "failure": "INVALID", "detail": "a < b & c"},
            {
                "name": "parity",
                "passed": None,
                "failure": "INVALID",
                "detail": "not run",
                "next_step": "give the `run`",
            },
        ],
        "disagreement": {
            "score": "jensen-shannon",
            "threshold": 0.1,
            "false_positive_rate": 0.05,
            "measured_false_positive_rate": rate(0.06),
            "calibration_images": 144,
            "alarm": [
                {
                    "attack": "transfer",
                    "score": "jensen-shannon",
                    "auroc": area,
                    "tpr_at_0.01": rate(0.4),
                    "tpr_at_0.05": rate(0.6),
                }
            ],
        },
        "combination": [
            {
                "what": "clean",
                "eps": 0.0,
                "mean_logits": 0.95,
                "mean_softmax": 0.95,
                "answers_differ": 0.0,
            }
        ],
        "members": {
            "gradient_norms": [1.0, 2.0],
            "transferability": {
                "eps": 0.1,
                "images": 9,
                "success": [[0.9, 0.1, 0.2], [0.1, 0.9, 0.3]],
            },
            "diversity": {"nats": [[None, 3.0], [3.0, None]]},
        },
        "attacks": [
            {"name": "noise", "threat": "transfer", "steps": 0},
            {"name": "pgd", "threat": "white_box", "steps": 20},
        ],
        "left_out": [{"what": "SGM", "why": "a surrogate has no <residual> branches"}],
        "outcomes": {"model": {"survived": []}},
        "surrogates": [],
        "seed": 0,
        "configuration_sha256": "3" * 64,
        "out_of_scope": ["patches"],
        "tool_version": "0",
        "run": {"finished": "now", "seconds": 1.0, "machine": "x"},
    }


def shown(*, pictures: Mapping[str, bytes] | None = None, **changes: Any) -> str:
    return page(Report.from_json(table() | changes), pictures or {}).decode()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_fetches_and_runs_nothing_and_its_policy_says_so() -> None:
    text = shown(pictures={"curves": PNG})
    tags = Tags()
    tags.feed(text)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "object", "form", "a", "base"}
    for tag, attributes in tags.seen:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert attributes["alt"]
    assert "http" not in text.replace("http-equiv", "")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in tags.seen if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_names_are_never_markup() -> None:
    text = shown(**table(name="<b>&.onnx"))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<b>" not in text
    assert "a &lt; b &amp; c" in text
    assert _words("use `<b>` or `eps`") == "use <code>&lt;b&gt;</code> or <code>eps</code>"


@pytest.mark.parametrize("verdict", ["VALID", "INCONCLUSIVE", "INVALID"])
def test_the_verdict_comes_first_with_what_was_not_passed(verdict: str) -> None:
    text = shown(verdict=verdict)
    body = text[text.index("<main>") :]
    assert body.index(f"<strong>{verdict}</strong>") < body.index("<h2>")
    assert "<code>parity</code> could not be run: not run. What to do: give the <code>" in body


def test_test_images_seen_in_training_are_named() -> None:
    assert "Test images seen in training" not in shown()
    pair: dict[str, Any] = {"test": "test/cat/<b>.png", "train": "train/dog/1.png", "kind": "near"}
    pair |= {"test_class": 0, "train_class": 1}
    leakage = {"test_images": 100, "training_images": 500, "exact": 0, "near": 1, "two_classes": 0}
    labels = {"labels": ["cat", "dog"]}
    text = shown(leakage=leakage | {"pairs": [pair]}, model=table()["model"] | labels)
    assert "test/cat/&lt;b&gt;.png" in text
    assert "cat, dog" in text
    assert "Of 100 test images 1 are so" in text


def test_radii_are_shown_as_they_were_given() -> None:
    eps = 8 / 255
    rows = [table()["robust_accuracy"][0] | {"eps": eps}]
    for given, text in (
        (["8/255"], "8/255 = 0.0314"),
        ([], "8/255 = 0.0314"),
        (["0.0313725"], "0.0313725"),
    ):
        threat = {"norm": "Linf", "eps": [eps], "eps_given": given}
        body = shown(threat_model=threat, robust_accuracy=rows, control=None, against=None)
        assert f">{text}</th>" in body
        assert f"eps {text}" in body
        assert "eps given" not in body


def test_plain_words_say_what_was_not_measured() -> None:
    assert "holds the model's weights leaves 70.0%" in unescape(shown())
    assert "was not measured" not in shown()
    assert "with the weights could do was not measured" in shown(**table(white_box=False))
    assert "every pixel by up to 10% of the pixel range" in " ".join(shown().split())
    l2 = shown(threat_model={"norm": "L2", "eps": [0.1]})
    assert "the image by up to 0.1 in L2 length" in l2


def test_a_figure_that_the_page_expects_and_is_not_there_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="threshold"):
        shown(disagreement={"alarm": []})


def test_an_attack_that_skips_broken_images_is_counted_among_those_it_ran_on() -> None:
    lines = [
        {"attack": "noise", "eps": 0.1, "version": version, "images": images}
        for version, images in (("float", "11-0"), ("delivered", "10-1"))
    ]
    assert '<td class="n">1 of 3</td>' in shown(outcomes={"model": {"survived": lines}})
    whole = [line | {"images": "1101"} for line in lines]
    assert '<td class="n">90.0</td>' in shown(outcomes={"model": {"survived": whole}})


def test_transfer_is_told_pair_by_pair_with_the_worst_by_name() -> None:
    told = table()
    (row,) = told["robust_accuracy"]
    pairs = {"mi-ce from one": 0.5, "mi-ce from two": 0.4, "bsr from two": 0.3, "noise": 0.9}
    row["transfer"] |= {
        "attacks": pairs,
        "worst": {"attack": "mi-ce from two", "value": 0.4},
    }
    surrogate = {"method": "standard", "architecture": ["a", "b"], "members": 2}
    told["surrogates"] = [
        surrogate | {"name": name, "holdout_accuracy": 0.9, "weights_sha256": "6" * 64}
        for name in ("one", "two")
    ]
    told["surrogates"][1] |= {"kind": "published", "clean_accuracy": 0.84}
    told["attacks"] = [
        {"name": name, "threat": "transfer", "steps": 1, "standing_only": name.startswith("bsr")}
        for name in pairs
    ]
    text = re.sub(r"\s*\n\s*", "", shown(**told))
    assert '<th scope="row">mi-ce</th><td class="n">50.0</td><td class="n">40.0</td>' in text
    assert '<td>mi-ce from two</td><td class="n">40.0</td><td class="n">70.0%</td>' in text
    assert "bsr</th>" not in text  # it was not run on all images
    assert "pair by pair" not in shown()
    assert "published, standard, a + b, members: 2, held-out accuracy 0.900, clean " in text
    assert "<td>standard, a + b, members: 2, held-out accuracy 0.900, sha256 6666" in text


def test_the_live_service_is_told_in_words() -> None:
    live: dict[str, Any] = {
        "eps": 0.1,
        "model_sha256": "0" * 64,
        "same_model": False,
        "exposure": "label",
        "exposed": ["index", "label"],
        "requests": 30,
        "clean_accuracy": rate(0.97),
        "transfer": rate(0.5),
        "substitute": {"answers": "labels", "queries": 7, "robust": rate(0.4)},
        "by_queries": {
            "attack": "rays",
            "answers": "labels",
            "images": 5,
            "broken": 1,
            "queries_each_at_most": 9,
            "queries": 17,
        },
    }
    assert "its watch" not in shown(live=live)
    live["by_queries"] |= {"flagged_images": 3, "flagged_after": 52, "refused": 2}
    text = shown(live=live)
    for said in (
        "ANOTHER model file",
        "label: index, label",
        "97.0 (92.0-100.0)",
        "broke 1 of 5 images in 17 queries, 9 an image at most",
        "trained on its labels for 7 queries",
        "saw the queries of 3 images, after 52 at the earliest; refused 2",
    ):
        assert said in text
    assert "{&#39;" not in text
    gone = shown(live={"error": "no answer from <host>"})
    assert "It stopped answering: no answer from &lt;host&gt;" in gone


def test_more_clean_images_have_a_row() -> None:
    assert "clean, of" not in shown()
    text = shown(more_clean_images={"model": rate(0.8) | {"n": 1500}, "control": rate(0.9)})
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text[text.index("clean, of") - 40 :])
    assert cells[:2] == ["clean, of 1500 images", "80.0 (75.0-85.0)"]
    assert cells[5] == "90.0%"


def test_callers_have_a_table_a_curve_and_a_stolen_model() -> None:
    text = unescape(shown(pictures={"queries": PNG}))
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text[text.index("Callers who see only") :])
    assert cells[:5] == [
        *("eps", "the model tells", "100 queries", "1,000 queries"),
        "half of the broken within",
    ]
    labels = ["0.1", "labels", "90.0% (85.0-95.0)", "60.0% (55.0-65.0)", "83 queries"]
    assert cells[10:15] == labels
    assert cells[5:10] == ["0.1", "scores", *labels[2:4], "-"]
    assert "fewest (rays; square)" in text
    assert "Chart: accuracy against queries" in text
    assert "2 networks resnet8, was trained on the model's scores for 900 queries" in text
    assert "95.5% of the test images" in text
    none = shown(by_queries=[])
    assert "Callers who see only" not in none
    told = Report.from_json(table())
    drawn = plots.query_curves(told)
    assert drawn is not None
    assert drawn.startswith(PNG)
    assert plots.query_curves(Report.from_json(table() | {"by_queries": []})) is None


def test_a_table_scrolls_by_keyboard_and_names_its_rows() -> None:
    tags = Tags()
    tags.feed(shown())
    boxes = [found for tag, found in tags.seen if found.get("class") == "wide"]
    assert boxes
    assert all(found["tabindex"] == "0" and found["aria-label"] for found in boxes)
    headings = [found["scope"] for tag, found in tags.seen if tag == "th"]
    assert {"row", "col"} <= set(headings)


def test_what_says_nothing_is_not_drawn() -> None:
    """A single member, and no image that it gets right."""
    nothing = {"transferability": {"eps": 0.1, "images": 0, "success": [[]]}}
    assert plots.heat_maps(nothing | {"diversity": {"nats": [[None]]}}) is None


def test_plots_are_pictures() -> None:
    told = Report.from_json(table())
    assert plots.curves(told).startswith(PNG)
    assert plots.curves(told) == plots.curves(told)
    maps = plots.heat_maps(table()["members"])
    assert maps is not None
    assert maps.startswith(PNG)
    answers = np.zeros((2, 3, 5, 5), np.int64)
    for names in (["a", "b"], ["$^$", "_a$_$b"]):  # matplotlib would read the latter as formulas
        assert plots.regions(answers, 0.2, names, [0, 1]).startswith(PNG)
    for channels in (1, 3):
        images = np.zeros((2, channels, 8, 8), np.uint8)
        assert plots.pictures(images, images + 5, [("a", "b")] * 2, 0.1).startswith(PNG)
