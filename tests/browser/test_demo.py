"""The demo page, as a person meets it: mouse, keyboard, small and dark screens, bad luck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dverge_serve.engine.outputs import softmax
from tests.browser.conftest import (
    EVIL,
    LONG,
    TOKEN,
    Open,
    Page,
    examples,
    playwright,
    save_digits_model,
)
from tests.serving import tiny
from tests.serving.server import Server, serving

expect = playwright.expect
FULL: dict[str, Any] = {
    "label": "7",
    "index": 7,
    "probability": 1.0,
    "top": [{"label": "7", "index": 7, "probability": 1.0}],
    "agreement": 1.0,
    "disagreement": 0.0,
}


def picture(data: bytes, name: str = "image.png") -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def overflowing(page: Page) -> list[str]:
    """Return what reaches beyond the right edge of the window."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth)
            .map((e) => `${e.tagName} ${e.id} ${e.textContent.slice(0, 40)}`)"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    return found


def test_an_example_shows_label_probability_votes_and_card(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/demo")
    page.get_by_role("button", name="a 3", exact=True).click()
    expect(page.locator("#label")).to_have_text("3")
    known = examples()
    logits = 2 * known @ known[3] - (known**2).sum(axis=1)
    mean = logits.astype(np.float64)
    mean[5] += 2 / 3
    mean[6] += 4 / 3
    expect(page.locator("#probability")).to_have_text(f"Probability {100 * softmax(mean)[3]:.1f}%")
    expect(page.locator("#votes tr")).to_have_count(3)
    expect(page.locator("#agreement")).to_contain_text("All 3 members")
    expect(page.locator("#alarm")).to_contain_text("Not suspicious")
    expect(page.get_by_role("status")).to_contain_text("Not suspicious")  # a screen reader says it
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 8
    expect(page.get_by_role("heading", level=1)).to_have_text("digits")
    expect(page.locator("#facts")).to_contain_text("VALID")
    expect(page.locator("#facts")).to_contain_text("97.0% (95.0% to 99.0%, 360 images)")
    robust = page.locator("#robust tbody tr")
    expect(robust).to_have_count(1)
    expect(robust).to_have_text("0.197.0% (95.0 to 99.0%)not measured")


def test_attacked_images_of_the_report_are_shown_and_can_be_tried(
    look: Open, digits: Server
) -> None:
    page = look(f"{digits.url}/demo", width=360)
    rows = page.locator("#attacked-rows tbody tr")
    expect(rows).to_have_count(2)
    expect(page.locator("#attacked-hint")).to_contain_text("at most 0.1 a pixel")
    expect(rows.nth(0)).to_have_text("3\u2260 83")
    expect(rows.nth(1)).to_contain_text(EVIL)  # text, never markup
    rows.nth(0).get_by_role("button", name="an attacked '3'").click()
    expect(page.locator("#label")).to_have_text("5")  # the picture that was sent is of a 5
    rows.nth(0).get_by_role("button", name="a clean '3'").click()
    expect(page.locator("#label")).to_have_text("3")


def test_members_that_differ_are_told_and_raise_the_alarm(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/demo")
    page.get_by_role("button", name="a 5 laid over a 6").click()
    expect(page.locator("#label")).to_have_text("6")
    expect(page.locator("#agreement")).to_have_text(
        "2 of 3 members give this answer (agreement 67%)."
    )
    votes = page.locator("#votes td.vote")
    expect(votes).to_have_text(["\u2260 5", "6", "6"])
    expect(page.locator("#alarm")).to_contain_text("do not trust this answer")


def test_an_image_is_chosen_or_dropped(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/demo")
    dark = tiny.encode(tiny.flat(0).resize((300, 200)), "JPEG")
    page.set_input_files("#file", picture(dark, "photo.jpg"))
    expect(page.locator("#status")).to_contain_text("Answered")
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 300
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
            return transfer;
        }""",
        list(tiny.png(255)),
    )
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})  # beside the field
    page.wait_for_selector("#picture.small")
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 8


def test_a_bad_file_is_refused_in_words_and_the_next_is_answered(
    look: Open, digits: Server
) -> None:
    page = look(f"{digits.url}/demo", width=320, height=500)
    page.get_by_role("button", name="a 7", exact=True).click()
    expect(page.locator("#label")).to_have_text("7")
    for bad, words in ((b"no image at all", "not an image"), (b"", "empty")):
        page.set_input_files("#file", picture(bad, "notes.txt"))
        expect(page.locator("#status .error")).to_contain_text(words)
        expect(page.locator("#status .error")).to_be_in_viewport()
        expect(page.locator("#answer")).to_be_hidden()  # no old answer beside a new error
    page.get_by_role("button", name="a 2", exact=True).click()
    expect(page.locator("#label")).to_have_text("2")
    expect(page.locator("#status .error")).to_have_count(0)


def test_a_token_is_asked_for_and_names_stay_text(look: Open, guarded: Server) -> None:
    page = look(f"{guarded.url}/demo", width=320)
    expect(page.locator("#token")).to_be_focused()
    expect(page.locator("#card")).to_be_hidden()
    page.set_input_files("#file", picture(tiny.png(255)))
    expect(page.locator("#status .error")).to_contain_text("token")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-message")).to_contain_text("does not accept")
    page.locator("#token").fill(TOKEN)
    page.keyboard.press("Enter")
    # The image that was refused is asked about again.
    expect(page.locator("#label")).to_have_text(EVIL)
    expect(page.locator("#token-form")).to_be_hidden()
    expect(page.locator("h1")).to_have_text(EVIL)
    expect(page.locator("#facts")).to_contain_text(EVIL)
    assert page.locator("script").count() == 1
    expect(page.locator("#examples")).to_be_hidden()  # digits say nothing to this model
    expect(page.locator("#votes-block")).to_be_hidden()
    expect(page.locator("#alarm")).to_be_hidden()
    expect(page.locator("#withheld")).to_contain_text("keeps the members' votes to itself")
    assert overflowing(page) == []
    page.set_input_files("#file", picture(tiny.png(0)))
    expect(page.locator("#label")).to_have_text(LONG)
    assert overflowing(page) == []


def test_the_start_page_fits_a_small_screen(look: Open, digits: Server) -> None:
    page = look(digits.url, width=320)
    expect(page.locator("table")).to_contain_text("sha256")
    assert overflowing(page) == []


def test_a_server_that_goes_away_is_told(look: Open, tmp_path: Path) -> None:
    save_digits_model(tmp_path / "model.onnx")
    with serving(tmp_path) as server:
        page = look(f"{server.url}/demo")
        expect(page.locator("h1")).to_have_text("digits")
    page.get_by_role("button", name="a 4", exact=True).click()
    expect(page.locator("#status .error")).to_contain_text("The service does not answer")
    expect(page.locator("#examples")).to_be_visible()  # one click asks again


def test_what_is_not_told_is_not_shown(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/demo")
    model = {"name": "digits", "sha256": "0" * 64}
    answers: list[tuple[int, Any]] = [
        (200, {"model": model, "predictions": [{"label": "7", "index": 7}]}),
        (200, {"model": model, "predictions": [{**FULL, "votes": [FULL["top"][0]] * 2}]}),
        (502, "<h1>a proxy's own page</h1>"),
    ]

    def answer(route: Any) -> None:
        status, body = answers.pop(0)
        route.fulfill(status=status, body=body if isinstance(body, str) else json.dumps(body))

    page.route("**/predict", answer)
    example = page.get_by_role("button", name="a 1", exact=True)
    example.click()
    expect(page.locator("#label")).to_have_text("7")
    expect(page.locator("#probability")).to_have_text("")
    for part in ("#top-block", "#votes-block", "#alarm"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator("#withheld")).to_have_text("This service tells the label alone.")
    example.click()  # a model without a report
    expect(page.locator("#alarm")).to_contain_text("No alarm is set")
    expect(page.locator("#agreement")).to_have_text(
        "All 2 members give this answer (agreement 100%)."
    )
    example.click()
    expect(page.locator("#status .error")).to_contain_text("answered 502 in a form")


def test_a_model_that_is_still_loading_is_waited_for(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/livez")
    loading = [503, 503]
    refusal = {"error": {"code": "starting", "message": "the model is still loading"}}

    def answer(route: Any) -> None:
        if loading:
            route.fulfill(status=loading.pop(), json=refusal)
        else:
            route.continue_()

    page.route("**/model", answer)
    page.goto(f"{digits.url}/demo")
    expect(page.locator("#card")).to_be_visible()
    assert not loading


def test_the_keyboard_is_enough(look: Open, digits: Server) -> None:
    page = look(f"{digits.url}/demo")
    # Makes the browser hand file dialogs over from now on, not only once the key is on its way.
    page.on("filechooser", lambda _: None)
    expect(page.locator("#examples")).to_be_visible()
    expect(page.locator("#attacked")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    outline = "label => getComputedStyle(label).outlineStyle"
    assert page.locator("#drop label").evaluate(outline) == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(picture(tiny.png(0)))
    expect(page.locator("#answer")).to_be_visible()
    for _ in range(4 + 10):  # the report's two pairs, then 0 to 9
        page.keyboard.press("Tab")
    example = page.get_by_role("button", name="a 9", exact=True)
    expect(example).to_be_focused()
    assert example.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#label")).to_have_text("9")


@pytest.mark.parametrize("width", [320, 1100])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_and_is_readable(look: Open, digits: Server, width: int, dark: bool) -> None:
    page = look(f"{digits.url}/demo", width=width, dark=dark)
    page.get_by_role("button", name="a 5 laid over a 6").click()
    expect(page.locator("#label")).to_be_in_viewport()
    page.emulate_media(reduced_motion="reduce")
    assert overflowing(page) == []
    ground = colour(page, "body", "backgroundColor")
    assert (luminance(ground) < 0.2) == dark
    for part in ("body", ".hint", "#facts th", "#votes .differs .vote", "a", "#alarm"):
        assert contrast(colour(page, part, "color"), ground) >= 4.5, part
    targets = page.locator(".example").all()
    assert all(target.bounding_box()["width"] >= 24 for target in targets)


def colour(page: Page, selector: str, name: str) -> tuple[float, ...]:
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")
    return tuple(int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3])


def luminance(colour: tuple[float, ...]) -> float:
    """Return WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return WCAG's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
