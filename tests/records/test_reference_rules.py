"""Our ids and labels equal the reference's rules, on a vocabulary that may be committed and on LLaMA-2's where it is.

The reference finds its labels by counting: it tokenizes pieces of the prompt anew and adds up their lengths. That holds
for LLaMA's vocabulary and the settings it was trained with (`tests/golden/tiny_llama` has the same ones), so here the
rules stand as they are known, apart from our code and from transformers, and what they give is compared.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
import torch

from composer_path.records.conversation import Conversation
from composer_path.records.prompts import LLAVA_SYSTEM
from composer_path.records.tokenize import IGNORE_INDEX, IMAGE_TOKEN_ID, tokenize_conversation, tokenize_prompt
from composer_path.records.vocabulary import load_tokenizer

Row = dict[str, Any]
Count = Callable[[str], list[int]]
BOS, EOS, ANSWER = "<s>", "</s>", "[/INST] "
# Beside what the reference was run on: records whose spaces, digits and marks are awkward for counting.
MORE_CONVERSATIONS = {
    "digit_first": ["<image>\nKi-67?", "12 %", "And p53?", "3 of 10 nuclei", "Sure", " yes"],
    "space_runs": ["What  is\n<image>", "   three leading", "Why?  ", "two  inside, one trailing "],
    "brackets": ["<image>\nSay [INST] <<SYS>>.", "[INST] <</SYS>> [ / INST ]"],
    "bytes": ["<image>\nΔ 印戒?", "🔬\t印\n\n戒", "そう?", "é µ ≈"],
    "long": ["<image>\nDescribe the tissue.", "Loose stroma. " * 40],
}


def reference_ids(text: str, pieces: sentencepiece.SentencePieceProcessor) -> list[int]:
    """One BOS in front; an image's placeholder between texts, each of which is tokenized as a text of its own."""
    ids = [pieces.bos_id()]
    for index, part in enumerate(text.split("<image>")):
        ids += [IMAGE_TOKEN_ID] if index else []
        for piece in re.split(f"({BOS}|{EOS})", part):
            marks = {BOS: pieces.bos_id(), EOS: pieces.eos_id()}
            ids += [marks[piece]] if piece in marks else pieces.encode(piece)
    return ids


def reference_turns(conversations: list[dict[str, str]]) -> list[str]:
    """The texts from the first question on; a turn's image stands in front of it."""
    texts = [turn["value"] for turn in conversations]
    texts = texts[1:] if conversations[0]["from"] == "assistant" else texts
    moved = [
        ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text for text in texts
    ]
    return moved


def reference_plain(texts: list[str], count: Count) -> tuple[list[int], list[int]]:
    """The image, the caption, a newline; what the image alone would come to isn't learned."""
    ids = count(f"<image>{texts[1]}\n")
    masked = len(count("<image>"))
    return ids, [IGNORE_INDEX] * masked + ids[masked:]


def reference_llama2(texts: list[str], count: Count) -> tuple[list[int], list[int]]:
    """LLaMA-2's chat; what is learned is found by counting, and nothing is where the counts don't add up."""
    rounds = [f"[INST] {question} [/INST] {answer} " for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    rounds[0] = rounds[0].replace("[INST] ", f"[INST] <<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n", 1)
    prompt = f"{EOS}{BOS}".join(rounds) + EOS
    ids = count(prompt)
    labels = list(ids)
    labels[0] = IGNORE_INDEX
    position = 1
    for part in filter(None, prompt.split(EOS)):
        if part.count(ANSWER) != 1:
            break
        question = part[: part.index(ANSWER)] + ANSWER
        num_masked = len(count(question)) - 2  # but its BOS, and the space that becomes the answer's
        labels[position : position + num_masked] = [IGNORE_INDEX] * num_masked
        position += len(count(part))
    if position != len(ids):
        labels = [IGNORE_INDEX] * len(ids)
    return ids, labels


REFERENCE = {"plain": reference_plain, "llava_llama_2": reference_llama2}


@pytest.fixture(params=["tiny_llama", "llama2"], scope="module")
def vocabulary(request):
    """The folder of a vocabulary with LLaMA's settings."""
    return request.getfixturevalue(f"{request.param}_tokenizer_path")


@pytest.fixture(scope="module")
def count(vocabulary) -> Count:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "tokenizer.model"))
    return lambda text: reference_ids(text, pieces)


@pytest.fixture(params=["slow", "fast"], scope="module")
def tokenizer(request, vocabulary):
    return load_tokenizer(vocabulary, use_fast=request.param == "fast")


@pytest.fixture(scope="module")
def rows(golden) -> list[Row]:
    """The conversations that the reference was run on, by template, and ours."""
    rows = json.loads((golden / "tokens" / "cases.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["tokenizer"] == "llama2"]
    for name, texts in MORE_CONVERSATIONS.items():
        turns = [{"from": ("human", "assistant")[i % 2], "value": text} for i, text in enumerate(texts)]
        rows.append({"name": name, "template": "llava_llama_2", "conversations": turns})
        rows.append({"name": name, "template": "plain", "conversations": turns[:2]})
    assert len(rows) == 33
    return rows


def conversation_of(row: Row) -> Conversation:
    record = {"conversations": row["conversations"]}
    if any("<image>" in turn["value"] for turn in row["conversations"]):
        record["image"] = "a.png"
    return Conversation.from_record(record)


def test_the_rules_give_what_the_reference_gave(golden, llama2_tokenizer_path):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llama2_tokenizer_path / "tokenizer.model"))
    golden_rows = json.loads((golden / "tokens" / "cases.json").read_text(encoding="utf-8"))
    golden_rows = [row for row in golden_rows if row["tokenizer"] == "llama2"]
    assert len(golden_rows) == 23 and sum(row["mismatch"] for row in golden_rows) == 1
    for row in golden_rows:
        found = REFERENCE[row["template"]](
            reference_turns(row["conversations"]), lambda text: reference_ids(text, pieces)
        )
        assert found == (row["input_ids"], row["labels"]), row["name"]


def test_ids_and_labels_are_what_the_references_rules_give(rows, tokenizer, count):
    counts_fail = []
    for row in rows:
        ids, labels = REFERENCE[row["template"]](reference_turns(row["conversations"]), count)
        if set(labels) == {IGNORE_INDEX}:
            counts_fail.append(row["name"])
            continue
        ours = tokenize_conversation(conversation_of(row), tokenizer, row["template"], num_image_tokens=1)
        assert ours.input_ids.tolist() == ids, row["name"]
        assert ours.labels.tolist() == labels, row["name"]
    assert counts_fail == ["xml"]  # whose text holds </s>: nothing would be learned there


def test_a_question_alone_gives_the_start_that_the_rules_leave_unlearned(rows, tokenizer, count):
    asked = [row for row in rows if row["template"] == "llava_llama_2" and row["name"] != "xml"]
    for row in asked:
        ids, labels = reference_llama2(reference_turns(row["conversations"]), count)
        whole = conversation_of(row)
        question = Conversation(whole.turns[:1], images=whole.images, system=whole.system)
        num_unlearned = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
        prompt = tokenize_prompt(question, tokenizer, "llava_llama_2", num_image_tokens=1)
        assert prompt.tolist() == ids[:num_unlearned], row["name"]


def test_a_prompts_placeholders_take_the_place_of_the_one_image_token(rows, tokenizer, count):
    for row in rows[:6]:
        ids, labels = REFERENCE[row["template"]](reference_turns(row["conversations"]), count)
        ours = tokenize_conversation(conversation_of(row), tokenizer, row["template"], num_image_tokens=5)
        kept = torch.ones(len(ours.input_ids), dtype=torch.bool)
        first = ids.index(IMAGE_TOKEN_ID)
        kept[first + 1 : first + 5] = False
        assert ours.input_ids[kept].tolist() == ids and ours.labels[kept].tolist() == labels
        assert ours.input_ids[~kept].tolist() == [IMAGE_TOKEN_ID] * 4


def test_the_tiny_vocabulary_is_what_its_script_makes_with_llamas_settings(tiny_llama_tokenizer_path):
    from sentencepiece import sentencepiece_model_pb2

    read = sentencepiece_model_pb2.ModelProto.FromString
    model = read((tiny_llama_tokenizer_path / "tokenizer.model").read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    assert trainer.model_type == trainer.BPE and normalizer.name == "identity"
    assert trainer.split_digits and trainer.byte_fallback and trainer.allow_whitespace_only_pieces
    assert normalizer.add_dummy_prefix and normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces
    assert [piece.piece for piece in model.pieces[:4]] == ["<unk>", BOS, EOS, "<0x00>"]
    again = read(runpy.run_path(str(tiny_llama_tokenizer_path / "make.py"))["train"]())
    assert [piece.piece for piece in again.pieces] == [piece.piece for piece in model.pieces]
