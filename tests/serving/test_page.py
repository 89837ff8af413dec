"""The chat page in a real browser, against a running endpoint: files, keys, errors, recording, light and dark."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium", path="/usr/bin")
if CHROMIUM is None:
    pytest.skip("no /usr/bin/chromium", allow_module_level=True)

PATIENCE_MS = 60_000
ANSWER_TOKENS = 6
CHAT = "**/v1/chat/completions"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
DROP = """([data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  for (const event of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(event, { bubbles: true, cancelable: true, dataTransfer }));
  }
}"""

expect = sync_api.expect
expect.set_options(timeout=PATIENCE_MS)
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, endpoint) -> Iterator[Open]:
    """Opens the page in a context of its own, with the given options, and waits until the model is there."""
    contexts = []

    def open_page(**options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(endpoint.url)
        expect(page.get_by_role("status").first).to_have_text(f"{endpoint.model} · ready")
        limit_answers(page)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


def limit_answers(page: Page) -> None:
    """A model of random weights would fill its whole context, and leave no room for a second question."""
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens in an answer").fill(str(ANSWER_TOKENS))
    page.keyboard.press("Escape")


def make_picture(path: Path) -> Path:
    picture = Image.new("RGB", (64, 64), (233, 228, 220))
    ImageDraw.Draw(picture).polygon([(14, 46), (32, 14), (50, 46)], fill=(20, 40, 200))
    picture.save(path)
    return path


def make_sound(path: Path) -> Path:
    seconds = np.arange(16_000) / 16_000
    soundfile.write(path, (0.4 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32), 16_000)
    return path


def drop(page: Page, path: Path, media_type: str) -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name, media_type])


def attachment(page: Page, name: str) -> Locator:
    return page.get_by_role("list", name="Attachments").get_by_role("listitem").filter(has_text=name)


def ask(page: Page, text: str) -> dict[str, Any]:
    """Sends a question and waits for its end; the body of the request."""
    page.get_by_label("Question").fill(text)
    with page.expect_request(CHAT) as request:
        page.get_by_label("Question").press("Enter")
    wait_for(last_turn(page), "done|failed")
    return request.value.post_data_json


def last_turn(page: Page) -> Locator:
    return page.get_by_role("article").last


def wait_for(turn: Locator, state: str) -> None:
    expect(turn).to_have_attribute("data-state", re.compile(state))


def answer_of(turn: Locator) -> str:
    """What the model wrote, which of a random one may be nothing."""
    text = turn.locator(".answered > .text").text_content()
    assert text
    return "" if text == "The answer is empty." else text


def part_types(message: dict[str, Any]) -> list[str]:
    return [part["type"] for part in message["content"]]


def stream_of(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def test_an_image_and_a_sound_are_asked_about(open_page, endpoint, tmp_path):
    page = open_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.reload()  # now with an eye on its requests
    limit_answers(page)
    drop(page, make_picture(tmp_path / "picture.png"), "image/png")
    page.locator("input[type=file]").set_input_files(make_sound(tmp_path / "horn.wav"))
    expect(attachment(page, "picture.png").get_by_role("img")).to_be_visible()
    expect(attachment(page, "horn.wav").get_by_role("radio", name="speech")).to_be_checked()
    attachment(page, "horn.wav").get_by_role("radio", name="sound").check()

    request = ask(page, "what do you hear?")
    assert request["stream"] is True and request["expert_load"] is True and request["temperature"] == 0
    assert request["max_completion_tokens"] == ANSWER_TOKENS
    (message,) = request["messages"]
    assert part_types(message) == ["image_url", "audio_url", "text"]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert message["content"][1]["audio_url"]["kind"] == "sound"

    turn = last_turn(page)
    wait_for(turn, "done")
    answer_of(turn)
    statistics = turn.locator(".stats").text_content()
    assert re.search(r"[\d.]+ tokens/s", statistics) and re.search(r"\d+ tokens read, \d+ written", statistics)
    table = turn.get_by_role("table").first
    kinds = table.locator("tbody tr").evaluate_all("rows => rows.map((row) => row.cells[0].textContent)")
    assert {"image", "sound", "your text", "the answer"} <= set(kinds)
    shares = table.locator("tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].slice(1).map((cell) => Number(cell.textContent)))"
    )
    for kind, row in zip(kinds, shares, strict=True):
        assert sum(row) == pytest.approx(100, abs=len(row) / 2), kind  # each share is rounded
    assert "image tokens" in turn.locator(".experts > summary").text_content().lower()

    assert problems == []
    outside = [url for url in requests if not url.startswith((endpoint.url, "blob:", "data:"))]
    assert outside == []


def test_the_keyboard_is_enough_and_the_conversation_is_kept(page):
    question = page.get_by_label("Question")
    page.get_by_text("Settings").focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if question.evaluate("node => node === document.activeElement"):
            break
    expect(question).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    wait_for(last_turn(page), "done")
    first = answer_of(last_turn(page))

    expect(question).to_be_focused()
    page.keyboard.type("and now?")
    with page.expect_request(CHAT) as request:
        page.keyboard.press("Enter")
    messages = request.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "first line\nsecond line"}]
    assert messages[1]["content"] == first
    expect(page.get_by_role("article")).to_have_count(2)
    wait_for(last_turn(page), "done")


def test_an_error_is_shown_in_words_and_the_conversation_goes_on(page, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture at all")
    drop(page, tmp_path / "notes.png", "image/png")
    ask(page, "what shape is in the image?")
    failed = page.get_by_role("article").first
    wait_for(failed, "failed")
    error = failed.get_by_role("alert")
    expect(error).to_contain_text("notes.png")
    assert not re.search(r"[{}]|undefined|messages\.", error.text_content())
    expect(failed.get_by_role("button", name="Retry")).to_be_visible()

    request = ask(page, "are you still there?")
    wait_for(last_turn(page), "done")
    assert [part_types(message) for message in request["messages"]] == [["text"]]

    failed.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Question")).to_have_value("what shape is in the image?")
    page.get_by_role("button", name="Remove notes.png").click()
    drop(page, make_picture(tmp_path / "picture.png"), "image/png")
    request = ask(page, "what shape is in the image?")
    wait_for(last_turn(page), "done")
    assert part_types(request["messages"][-1]) == ["image_url", "text"]


def test_a_broken_answer_can_be_retried(page):
    replica_lost = {"error": {"message": "the answer broke off", "type": "server_error", "param": None, "code": None}}
    body = stream_of(piece("half an"), replica_lost)
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "hello")
    wait_for(last_turn(page), "failed")
    expect(last_turn(page).get_by_role("alert")).to_have_text("The answer broke off.")
    page.unroute(CHAT)
    last_turn(page).get_by_role("button", name="Retry").click()
    wait_for(last_turn(page), "done")
    assert not answer_of(last_turn(page)).startswith("half an")


def test_escape_stops_the_answer(page):
    page.route(CHAT, lambda route: None)  # an answer that never begins
    page.get_by_label("Question").fill("hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop the answer")).to_be_visible()
    page.keyboard.press("Escape")
    wait_for(last_turn(page), "stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_what_the_model_writes_stays_text(page):
    hostile = "<img src=x onerror=\"document.title='taken'\"><b>bold</b> ünïcödé"
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    body = stream_of(piece(hostile[:20]), piece(hostile[20:]), finish) + "data: [DONE]\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, hostile)
    wait_for(last_turn(page), "done")
    assert answer_of(last_turn(page)) == hostile
    assert last_turn(page).locator("img, b").count() == 0
    assert page.title() != "taken"


def test_a_recording_is_attached_and_sent(page):
    page.get_by_role("button", name="Record speech").click()
    expect(page.get_by_role("timer")).to_have_text(
        re.compile(r"^(?!0:00)\d+:\d\d$")
    )  # whichever second it shows when it is seen
    page.get_by_role("button", name="Stop and attach").click()
    expect(attachment(page, "speech.wav").get_by_role("radio", name="speech")).to_be_checked()
    request = ask(page, "")
    wait_for(last_turn(page), "done")
    (part,) = request["messages"][0]["content"]
    assert part["audio_url"]["kind"] == "speech"
    head, data = part["audio_url"]["url"].split(",")
    assert head == "data:audio/wav;base64"
    assert len(base64.b64decode(data)) > 16_000  # half a second


def test_light_dark_and_narrow(open_page, tmp_path):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme, viewport={"width": 360, "height": 740})
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert overflow(page) <= 0
        drop(page, make_picture(tmp_path / "picture.png"), "image/png")
        page.locator("input[type=file]").set_input_files(make_sound(tmp_path / f"{'long_' * 20}name.wav"))
        ask(page, "w" * 100)
        page.get_by_text("Layer by layer").click()
        page.get_by_text("Settings").click()
        assert overflow(page) <= 0
    assert len(backgrounds) == 2


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
