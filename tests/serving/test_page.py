"""The page: what it is made of, and in a real browser asking, following up, stopping, keys, colours and widths."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="serving needs the extra 'serve'")

from browser import CHROMIUM, Tab, browser_tab
from served_model import OTHER_TILE, TILE, Served, served
from tiny_model import tiny_model_folder

from composer_path.asking.assistant import Assistant
from composer_path.serving.page import PAGE

KEY = "correct-horse-battery"
QUESTION = "Which stain was used here, H&E or IHC?"
ANSWERED = "document.getElementById('state').textContent === 'The model has answered' && !writing"


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


def test_the_page_names_nothing_elsewhere_and_labels_every_control() -> None:
    assert not re.findall(r"(?:src|href)=\"(?!data:,\")|https?://|@import|url\(", PAGE)
    controls = re.findall(r"<(?:input|textarea|button)\b[^>]*>", PAGE)
    assert len(controls) == 6
    for control in controls:
        named = re.search(r'id="(\w+)"', control)
        assert named and (f'for="{named[1]}"' in PAGE or control.startswith("<button")), control
    assert 'lang="en"' in PAGE and "innerHTML" not in PAGE and "localStorage" not in PAGE


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return Assistant.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"))


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    pytest.importorskip("websockets")
    with browser_tab(tmp_path / "profile") as opened:
        yield opened
        errors = [one for one in opened.complaints if '"level": "error"' in one or "exceptionDetails" in one]
        assert [one for one in errors if "status of 4" not in one] == []  # what the server refuses is told there, too


def talk(tab: Tab) -> list[dict[str, Any]]:
    return list(json.loads(tab.run("JSON.stringify(messages)")))


def slowed(running: Served, seconds: float) -> None:
    step = running.engine._decoding.step

    def slowly() -> None:
        time.sleep(seconds)
        step()

    running.engine._decoding.step = slowly  # type: ignore[method-assign]


@pytest.mark.slow
@needs_browser
def test_a_picture_is_asked_about_and_again_by_keyboard(assistant: Assistant, tab: Tab) -> None:
    with served(assistant) as running:
        tab.open(running.url)
        tab.wait("model === 'tiny'")
        assert tab.run("document.activeElement.id") == "question"
        tab.choose_files("#files", [TILE, OTHER_TILE])
        tab.wait("document.querySelectorAll('#chosen img').length === 2")
        tab.run("document.querySelectorAll('#chosen button')[1].focus()")
        tab.press("Enter")  # the second is removed again
        tab.wait("document.querySelectorAll('#chosen img').length === 1")
        tab.press("Tab")  # from the field for files, where the focus went
        tab.run("document.getElementById('question').focus()")
        tab.type(QUESTION)
        slowed(running, 0.03)
        tab.press("Enter")
        tab.wait("document.querySelector('.writing') && document.querySelector('.writing').textContent.length > 3")
        assert tab.run("document.getElementById('talk').getAttribute('aria-busy')") == "true"
        tab.wait(ANSWERED)
        images = [assistant.read_image(TILE)]
        first = assistant.answer([("human", QUESTION)], images)
        assert talk(tab)[1] == {"role": "assistant", "content": first}
        assert tab.run("document.activeElement.id") == "question"
        shown = tab.run("[...document.querySelectorAll('#talk p')].map(p => p.textContent)")
        assert shown == [QUESTION, first]
        tab.run("document.getElementById('state').textContent = ''")
        # The tiny model's answer fills its context: the follow-up is refused, and everything stays as it was.
        tab.type("Sure?")
        tab.press("Enter")
        tab.wait("document.getElementById('problem').textContent.includes('start a new one')")
        assert len(talk(tab)) == 2 and tab.run("document.getElementById('question').value") == "Sure?"
        tab.run("document.getElementById('anew').click()")
        assert talk(tab) == [] and tab.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.slow
@needs_browser
def test_an_answer_can_be_stopped_and_followed_up(assistant: Assistant, tab: Tab) -> None:
    with served(assistant) as running:
        slowed(running, 0.1)
        tab.open(running.url)
        tab.wait("model === 'tiny'")
        tab.type("What?")
        tab.press("Enter")
        tab.wait("document.querySelector('.writing') && document.querySelector('.writing').textContent.length > 0")
        tab.run("document.getElementById('stop').click()")
        tab.wait(ANSWERED)
        part = talk(tab)[1]["content"]
        whole = assistant.answer([("human", "What?")])
        assert part and part != whole and whole.startswith(part)
        assert tab.run("document.querySelectorAll('.turn p')[1].textContent") == f"{part} (stopped)"
        end = time.monotonic() + 10
        while running.engine.num_running and time.monotonic() < end:
            time.sleep(0.05)
        assert running.engine.num_running == 0
        tab.run("document.getElementById('state').textContent = ''")
        tab.type("<b>And?</b>")
        tab.run("document.getElementById('ask').click()")
        tab.wait(ANSWERED)
        turns = [("human", "What?"), ("assistant", part), ("human", "<b>And?</b>")]
        assert talk(tab)[3]["content"] == assistant.answer(turns)
        assert tab.run("document.querySelectorAll('b').length") == 0


@pytest.mark.slow
@needs_browser
def test_a_key_is_asked_for_where_it_is_needed(assistant: Assistant, tab: Tab) -> None:
    with served(assistant, key=KEY) as running:
        tab.open(running.url)
        tab.wait("!document.getElementById('locked').hidden")
        assert "key" in tab.run("document.getElementById('problem').textContent")
        for key, said in (("wrong", "This key is not the server's."), (KEY, "")):
            tab.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
            tab.type(key)
            tab.run("document.getElementById('question').value = 'What?'; document.getElementById('ask').click()")
            tab.wait(f"document.getElementById('problem').textContent === {json.dumps(said)} && !writing")
        tab.wait("messages.length === 2")
        assert tab.run("document.getElementById('locked').hidden") is True


@pytest.mark.slow
@needs_browser
def test_a_captioner_is_asked_to_describe(tmp_path_factory: pytest.TempPathFactory, tab: Tab) -> None:
    folder = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_captioner", "plain")
    with served(Assistant.from_pretrained(folder)) as running:
        tab.open(running.url)
        tab.wait("document.getElementById('ask').textContent === 'Describe'")
        assert tab.run("document.getElementById('asking').hidden") is True
        tab.choose_files("#files", [TILE])
        tab.wait("document.querySelectorAll('#chosen img').length === 1")
        tab.run("document.getElementById('ask').click()")
        tab.wait(ANSWERED)
        assert talk(tab)[1]["content"] == running.assistant.caption([running.assistant.read_image(TILE)])


@pytest.mark.slow
@needs_browser
def test_it_is_light_and_dark_and_fits_a_phone(assistant: Assistant, tab: Tab, tmp_path: Path) -> None:
    with served(assistant) as running:
        colours = {}
        for dark in (False, True):
            tab.look(width=360, height=640, dark=dark)
            tab.open(running.url)
            tab.wait("model === 'tiny'")
            found = tab.run(
                "(([body, note]) => JSON.stringify([body.backgroundColor, body.color, note.color]))"
                "([document.body, document.querySelector('.note')].map(one => getComputedStyle(one)))"
            )
            colours[dark] = [luminance(colour) for colour in json.loads(found)]
            assert tab.run("document.documentElement.scrollWidth") <= 360
            for ink in colours[dark][1:]:
                low, high = sorted((colours[dark][0], ink))
                assert (high + 0.05) / (low + 0.05) >= 4.5  # what WCAG asks of text
            heights = tab.run("[...document.querySelectorAll('.row .button, .row .main')].map(b => b.offsetHeight)")
            assert min(heights) >= 44  # px, for fingers
        assert colours[False][0] > 0.9 and colours[True][0] < 0.1
        asked = tab.run("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)")
        assert set(asked) == {running.url}
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 3000


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(factor * part for factor, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
