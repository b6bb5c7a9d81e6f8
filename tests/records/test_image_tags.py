"""What stands for `<image>` is seen, whatever it is written with, and nothing else is."""

from __future__ import annotations

import pytest
from tiny_records import answer, question, record

from composer_path.records.image_tags import lookalikes, read_image_tags
from composer_path.records.rules import problems_of

READ = [
    "<IMAGE>",
    "<Image>",
    "<images>",
    "<image_1>",
    "<image-1>",
    "<|image|>",
    "<|image_1|>",
    "<img>",
    "<image/>",
    "<image />",
    "< image >",
    "<image_placeholder>",
    "<ImageHere>",
    "<|image_pad|>",
    "<picture>",
    "<image_token>",
    "[IMG]",
    "[IMAGE]",
    "[Image 1]",
    "{image}",
    "{{image}}",
    "&lt;image&gt;",
    "\uff1cimage\uff1e",
    "<\uff49\uff4d\uff41\uff47\uff45>",
    "<im\u200bage>",
    "<\u0456m\u0430ge>",
    "\u3008image\u3009",
    "<\u2170mage>",
]
ONLY_REFUSED = [
    "</image>",
    "<image",
    "<image src='Miller.png'>",
    "<img src='Miller.png'/>",
    "<start_of_image>",
    "<|vision_start|>",
    "<IMG_CONTEXT>",
    "<im_patch>",
    "<im_start>",
    "<video>",
    "<audio>",
    "[IMG_BREAK]",
    "![a gland](Miller.png)",
    "<__media__>",
    "<|media_pad|>",
    "<vision>",
    "<visual_token>",
    "<|vision_end|>",
    "data:image/png;base64,iVBORw0KGgo",
]
TEXT = [
    "Which image shows a gland?",
    "p <0.05 in image A and >5 in image B",
    "an imaging <imaging> finding",
    "(image 1)",
    "[Figure 1]",
    "a < b, image > c",
    "\uff08image\uff09",
    "\u00b5m, 5\u2009% of \uff21\uff0c",
    "[1] and {2}",
    "<IMAGINE>",
]


@pytest.mark.parametrize("tag", [*READ, *ONLY_REFUSED])
@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_what_looks_like_the_tag_is_refused_wherever_it_stands(tag: str, place: str) -> None:
    text = f"Look at {tag} closely."
    value = record(question(text if place == "question" else "?"), answer(text if place == "answer" else "!"))
    value |= {"system": text} if place == "system" else {}
    problems = problems_of(value)
    assert [problem.rule for problem in problems] == ["lookalike-tag"]
    assert "Miller" not in str(problems) and "gland" not in str(problems)


@pytest.mark.parametrize("text", TEXT)
def test_text_that_only_speaks_of_images_is_text(text: str) -> None:
    assert list(lookalikes(text)) == []
    assert problems_of(record(question(text), answer(text), system=text)) == []


@pytest.mark.parametrize("tag", READ)
def test_it_is_read_as_the_tag_when_asked(tag: str) -> None:
    value = read_image_tags(record(question(f"Look at {tag}\nclosely. 5 \u00b5m"), answer(), image="a.png"))
    assert value["conversations"][0]["value"] == "Look at <image>\nclosely. 5 \u00b5m"
    assert problems_of(value) == []


@pytest.mark.parametrize("tag", ONLY_REFUSED)
def test_what_has_another_meaning_is_never_read(tag: str) -> None:
    value = record(question(f"{tag} Which?"), answer(), image="a.png")
    assert read_image_tags(value) == value


def test_answers_are_never_read_and_stay_refused() -> None:
    value = record(question("<image>"), answer("<IMAGE>"), image="a.png")
    assert read_image_tags(value) == value
    assert [problem.rule for problem in problems_of(read_image_tags(value))] == ["lookalike-tag"]


@pytest.mark.parametrize(
    ("texts", "read"),
    [
        (["<image_1><image_2>"], True),
        (["<image_0>", "<image_1>"], True),
        (["<image_2><image_1>"], False),
        (["<image_1>", "Again <image_1>"], False),
        (["<image_1><image_3>"], False),
    ],
)
def test_numbered_tags_are_read_only_in_their_order(texts: list[str], read: bool) -> None:
    value = record(*(turn for text in texts for turn in (question(text), answer())), image=["a", "b"])
    assert (problems_of(read_image_tags(value)) == []) == read


@pytest.mark.parametrize("value", [None, [], {}, {"conversations": 1}, {"conversations": [1, {}, {"from": "human"}]}])
def test_what_is_no_record_stays_as_it_is(value: object) -> None:
    assert read_image_tags(value) == value
