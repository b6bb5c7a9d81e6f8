"""Questions about pictures: free ones (PathVQA), multiple choice (PMC-VQA, PathMMU, VLMEvalKit), REG's chains."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from composer_path.layouts.captions import reg_picture
from composer_path.layouts.choices import put_together
from composer_path.layouts.row import IMAGE_KEYS, Row, asked, untagged, wrong_type
from composer_path.records.rules import IMAGE_TAG, RecordError

_OPTION_LETTERS = "ABCDEFGHIJ"
_MOST_NO_PICTURE = 64  # characters: base64 of no picture is as short, so it is something else, such as a row's index
_END_OF_CHAIN = {"", "none", "null", "n/a", "end", "stop"}


def questions(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{image, question, answer}`, in JSON, as columns, or with the picture's bytes; `options` make it a choice."""
    images = row.pictures(*IMAGE_KEYS) or [row.need(*IMAGE_KEYS)]
    question, answer = row.text("question"), row.text("answer")
    if row.has("options", "choices"):
        question, answer = put_together(question, _options(row, "options", "choices"), answer)
    return {**row.about(), **asked(images, untagged(question, "question"), answer)}


def pmc_vqa(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """Columns `Figure_path`, `Question`, `Choice A` to `Choice D`, `Answer` (a letter or a text), `Answer_label`."""
    options = [row.text(f"Choice {letter}") for letter in "ABCD" if row.has(f"Choice {letter}")]
    answers = [str(row.get(key)) if row.has(key) else None for key in ("Answer_label", "Answer")]
    question, answer = put_together(row.text("Question"), options, *answers)
    return {**row.about("pmc-vqa"), **asked([row.text("Figure_path")], untagged(question, "Question"), answer)}


def pathmmu(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{img, question, options: ["A) ...", ...], answer}`; PathCLS names its pictures under `source_img`."""
    name = row.text("source_img") if row.has("source_img") else row.text("img")
    row.mark("img", "No", "split")
    question, answer = put_together(row.text("question"), _options(row, "options"), row.text("answer"))
    category = row.get("category")
    source = f"pathmmu/{category}" if isinstance(category, str) else "pathmmu"
    return {**row.about(source), **asked([name], untagged(question, "question"), answer)}


def vlmevalkit(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """Columns `index`, `image` (base64) or `image_path`, `question`, `A`, `B` and so on, `answer`, `category`."""
    row.mark("index", "category", "split")
    letters = [letter for letter in _OPTION_LETTERS if row.has(letter)]
    if letters != list(_OPTION_LETTERS[: len(letters)]):
        raise RecordError("impossible-answer", "a letter without an option before one with", "close the gap", "options")
    question, answer = put_together(row.text("question"), [row.text(one) for one in letters], row.text("answer"))
    if row.has("hint"):
        question = f"{row.text('hint').strip()}\n{question}"
    name = row.get("image_path")
    image = row.embed(_decoded(row.text("image")), "image", name) if row.has("image") else row.text("image_path")
    return {**row.about(), **asked([image], untagged(question, "question"), answer)}


def reg_chain(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{id, chain_of_thought: [{question, answer, next_question}, ...]}`: the chain's steps become turns."""
    steps = row.need("chain_of_thought")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise wrong_type("chain_of_thought", "a list of {question, answer, next_question}")
    turns: list[dict[str, str]] = []
    for number, step in enumerate(steps):
        where = f"chain_of_thought[{number}]"
        one, is_last = Row(step), number == len(steps) - 1
        if not one.has("question") or not one.has("answer") or _folded(one.get("answer")) == "":
            raise _truncated("a step without a question or an answer", where)
        announced = _folded(one.get("next_question"))
        if is_last and announced not in _END_OF_CHAIN:
            raise _truncated("a last step that announces another", where)
        if not is_last and announced != _folded(steps[number + 1].get("question")):
            raise _truncated("a step that announces another question than the one that follows", where)
        tag = f"{IMAGE_TAG}\n" if number == 0 else ""
        turns.append({"from": "human", "value": tag + untagged(one.text("question"), where)})
        turns.append({"from": "gpt", "value": one.text("answer")})
    if not turns:
        raise _truncated("no step", "chain_of_thought")
    return {**row.about("reg"), "image": reg_picture(row), "conversations": turns}


def _options(row: Row, *keys: str) -> list[str]:
    options = row.need(*keys)
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        raise wrong_type(keys[0], "a list of strings")
    return options


def _decoded(text: str) -> bytes:
    if len(text) <= _MOST_NO_PICTURE:
        found = f"a text of {len(text)} characters, too short for a picture as base64"
        fix = "put the picture into each row"
        raise RecordError("missing-file", found, fix, "image")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text), validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("unreadable-image", "no base64", "encode the file's bytes as base64", "image") from None


def _folded(text: Any) -> str:
    return re.sub(r"\s+", " ", text.strip().casefold()) if isinstance(text, str) else ""


def _truncated(found: str, where: str) -> RecordError:
    return RecordError("truncated-chain", found, "take the whole chain from a newer release, or leave it out", where)
