"""What the exported chat template writes has the ids of training, whatever a conversation says."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tokenizer_fixtures import CHATML, LLAMA2, LLAMA3, train_byte_level_tokenizer
from transformers import AddedToken

from composer_path.hugging_face.image_token import with_image_token
from composer_path.hugging_face.processor import ComposerPathProcessor
from composer_path.hugging_face.processor_folder import render, tried_chat_template
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.prompts import PlainTemplate, get_template
from composer_path.records.tokenize import IMAGE_TOKEN_ID, TextPreparation
from composer_path.records.vocabulary import load_tokenizer, text_encoder

GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATS = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "gemma": GEMMA, "phi": PHI}
WORDS = [
    "What organ?",
    " ",
    "\n",
    "  blanks ",
    "Zellkerne, µm²",
    "<|im_end|>",
    "</s>",
    "<s>",
    "[/INST]",
    "<|end|>",
    "]",
]
WORDS += ["x", "\n\n", "<", "|im_start|>", "\ue000", "\ue001", "\ue002", "組織", "<tool_call>", "    ", "(a) 1.5", "1"]


def tokenizer_of(name: str, kind: str, mistral: Any) -> Any:
    """A tokenizer with a chat template; of `phi`, special tokens take the blanks behind them."""
    if kind == "mistral":
        tokenizer = copy.deepcopy(load_tokenizer(mistral, use_fast=False))
    else:
        tokenizer = train_byte_level_tokenizer()
    if name == "gemma":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    if name == "phi":
        marks = ["<|user|>", "<|assistant|>", "<|system|>"]
        ends = [AddedToken(mark, rstrip=True, normalized=False, special=True) for mark in [*marks, "<|end|>"]]
        tokenizer.add_tokens(ends, special_tokens=True)
    tokenizer.chat_template = CHATS.get(name)
    return tokenizer


def processor_for(tokenizer: Any, text: TextPreparation, token: str, chat_template: str) -> ComposerPathProcessor:
    """One that makes ids; nobody shows it a picture."""
    processor = ComposerPathProcessor.__new__(ComposerPathProcessor)
    processor.tokenizer, processor.image_token, processor.chat_template = tokenizer, token, chat_template
    processor.image_token_id = tokenizer.convert_tokens_to_ids(token)
    processor.num_image_tokens, processor._prompt_template = text.num_image_tokens, text.template
    return processor


def some_conversation(draw: random.Random, template: str, system: bool) -> tuple[Conversation, list[dict[str, Any]]]:
    """A random one as a record and as messages of strings."""

    def say() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randrange(4)))

    turns: list[Turn] = []
    for _ in range(1 if template == "plain" else draw.randint(1, 3)):
        parts = [say()]
        for _ in range(draw.choice((0, 0, 1, 2))):
            parts += ["<image>", say()]
        turns += [Turn("human", "".join(parts)), Turn("assistant", say())]
    if draw.random() < 0.7:
        turns.pop()
    said = draw.choice((None, None, "", say())) if system else None
    count = sum(turn.text.count("<image>") for turn in turns if turn.role == "human")
    roles = {"human": "user", "assistant": "assistant"}
    messages: list[dict[str, Any]] = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    if said is not None:
        messages.insert(0, {"role": "system", "content": said})
    return Conversation(tuple(turns), ("",) * count, system=said), messages


CASES = [(name, kind) for kind in ("byte_level", "mistral") for name in ("plain", "llava_llama_2", *CHATS)]
CASES.remove(("chatml", "mistral"))  # that vocabulary has no such tokens, so that answers have no end
CASES.remove(("llama3", "mistral"))


@pytest.mark.parametrize("position", ["front", "inline"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_random_conversations_get_the_ids_of_training(
    mistral_tokenizer_path: Any, name: str, kind: str, position: Any
) -> None:
    """24 of each make 528 in all; also through the tokenizer that an exported folder gives back."""
    template = name if name in ("plain", "llava_llama_2") else "chat_template"
    tokenizer, token = with_image_token(tokenizer_of(name, kind, mistral_tokenizer_path))
    text = TextPreparation(get_template(template), 3, None, position)
    jinja = tried_chat_template(text, tokenizer, token.text)
    assert jinja is not None
    processor = processor_for(tokenizer, text, token.text, jinja)
    draw = random.Random(f"{name} {kind} {position}")
    for _ in range(24):
        conversation, messages = some_conversation(draw, template, name not in ("llama2", "gemma"))
        asking = conversation.turns[-1].role == "human"
        if asking:
            ids = text.prompt(conversation, text_encoder(tokenizer)).tolist()
        else:
            ids = replace(text, max_seq_len=None).tokenize(conversation, text_encoder(tokenizer)).input_ids.tolist()
        expected = [token.id if id == IMAGE_TOKEN_ID else id for id in ids]
        found = processor.ids_of(render(jinja, tokenizer, messages, asking))
        assert found == expected, (messages, tokenizer.decode(found), tokenizer.decode(expected))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_folder_s_template_is_handed_on_as_it_is(mistral_tokenizer_path: Any, name: str, kind: str) -> None:
    """The tokenizer of an exported folder has the template that the export wrote; prompts and the next export agree."""
    template = name if name in ("plain", "llava_llama_2") else "chat_template"
    tokenizer, token = with_image_token(tokenizer_of(name, kind, mistral_tokenizer_path))
    text = TextPreparation(get_template(template), 3, None, "front")
    jinja = tried_chat_template(text, tokenizer, token.text)
    turns = (Turn("human", "<image>\n A? "), Turn("assistant", " B"), Turn("human", " C\n"))
    asked = Conversation(turns[:1] if template == "plain" else turns, ("",))
    before = text.prompt(asked, text_encoder(tokenizer)).tolist()
    again = copy.deepcopy(tokenizer)
    again.chat_template = jinja
    assert text.prompt(asked, text_encoder(again)).tolist() == before
    assert tried_chat_template(text, again, token.text) == jinja


@dataclass(frozen=True)
class WithMapping(PlainTemplate):
    """A template that no table of results can look up."""

    words: dict[str, str] = field(default_factory=dict)


def test_a_template_that_holds_a_mapping_is_tried_too(mistral_tokenizer_path: Any) -> None:
    tokenizer, token = with_image_token(load_tokenizer(mistral_tokenizer_path))
    text = TextPreparation(get_template("plain"), 3, None)
    own = replace(text, template=WithMapping())
    assert tried_chat_template(own, tokenizer, token.text) == tried_chat_template(text, tokenizer, token.text)
