"""A chat template with which a stock LLaVA's processor writes what the model was trained on, checked id by id.

A stock processor encodes a prompt's whole text at once: what spells a special token becomes one there. Where that gives
other ids than training did, there is no template, rather than one that asks otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from composer_path.records.chat_template import own_template
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.prompts import ChatTemplate, LlavaLlama2Template, PlainTemplate
from composer_path.records.tokenize import TextPreparation

log = logging.getLogger(__name__)

# Each message's content as one text: parts on lines of their own, images in front where they were trained there.
_FLAT = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='', images=0, first=true) -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set said = image_tag if part['type'] == 'image' else part['text'] -%}
      {%- set content.text = said if content.first else content.text + '\\n' + said -%}
      {%- set content.first = false -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set content.images = content.text.split(image_tag) | length - 1 -%}
  {%- if in_front and content.images and message['role'] == 'user' -%}
    {%- set rest = content.text.replace(image_tag, '') | trim -%}
    {%- set content.text = ((image_tag + '\\n') * content.images)[:-1] + ('\\n' + rest if rest else '') -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
_LLAMA_2 = """{%- set system = namespace(text=usual_system) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set system.text = message['content'] -%}
  {%- elif message['role'] == 'user' -%}
    {{- bos + '[INST] ' -}}
    {%- if system.text -%}{{- '<<SYS>>\\n' + system.text + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
    {%- set system.text = '' -%}
    {{- message['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] + ' ' + eos -}}
  {%- endif -%}
{%- endfor -%}
"""
_PLAIN = """{{- bos -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- ((image_tag + '\\n') * (message['content'].split(image_tag) | length - 1))[:-1] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- message['content'] + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""
_SYSTEM = """{%- if messages[0]['role'] != 'system' -%}
  {%- set messages = [{'role': 'system', 'content': usual_system}] + messages -%}
{%- endif -%}
"""
QUESTIONS = ("What is shown?", "Describe it.\nBriefly: é, 3 µm")
RARE = (
    "Two  blanks.\n\n\nThree lines.",
    " blanks around ",
)  # which transformers 5 splits otherwise in LLaMA's vocabularies


def stock_chat_template(text: TextPreparation, tokenizer: PreTrainedTokenizerBase, token: str) -> str | None:
    """Jinja for a stock processor with this tokenizer; None where it would give other ids than training did.

    Args:
        text: How text was prepared.
        tokenizer: As a stock processor loads it, with the image's token.
        token: The image's token.
    """
    template = text.template
    if isinstance(template, LlavaLlama2Template):
        body = _LLAMA_2
    elif isinstance(template, PlainTemplate):
        body = _PLAIN
    elif isinstance(template, ChatTemplate) and isinstance(tokenizer.chat_template, str):
        body = (_SYSTEM if template.system is not None else "") + own_template(tokenizer)
    else:
        return None
    said = {
        "image_tag": repr(token),  # Python's escapes are Jinja's
        "bos": repr(tokenizer.bos_token or ""),
        "eos": repr(tokenizer.eos_token or ""),
        "usual_system": repr(getattr(template, "system", None) or ""),
        "in_front": str(text.image_position == "front").lower(),
    }
    jinja = "".join(f"{{%- set {name} = {value} -%}}\n" for name, value in said.items()) + _FLAT + body
    if not all(_same(jinja, text, tokenizer, token, probe) for probe in _probes(template, QUESTIONS)):
        return None
    if not all(_same(jinja, text, tokenizer, token, probe) for probe in _probes(template, RARE)):
        words = "this transformers splits runs of blanks otherwise than training did, so such questions get other ids"
        log.warning("--as llava-hf: %s", words)
    return jinja


def _probes(template: Any, questions: Sequence[str]) -> list[Conversation]:
    """Conversations of one and two turns, with none to two images."""
    found = []
    for question in questions:
        for images in (0, 1, 2) if template.takes_question else (1, 2):
            asked = Turn("human", f"{IMAGE_TAG}\n" * images + question)
            found.append(Conversation(turns=(asked,), images=("",) * images))
            if template.takes_question:
                later = (asked, Turn("assistant", "Glands."), Turn("human", question))
                found.append(Conversation(turns=later, images=("",) * images))
    return found


def _same(
    jinja: str, text: TextPreparation, tokenizer: PreTrainedTokenizerBase, token: str, conversation: Conversation
) -> bool:
    """Whether a stock processor's ids of a conversation are those of training."""
    stock: Any = tokenizer
    id = stock.convert_tokens_to_ids(token)
    ours = [id if one < 0 else one for one in text.prompt(conversation, tokenizer).tolist()]
    try:
        said: str = stock.apply_chat_template(
            messages_of(conversation.turns), chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # Jinja's own, of a tokenizer's template that takes no such conversation
        return False
    count = text.num_image_tokens if isinstance(text.num_image_tokens, int) else 1
    starts = bool(stock.bos_token) and said.startswith(stock.bos_token)
    theirs = stock(said.replace(token, token * count), add_special_tokens=not starts)["input_ids"]
    return list(theirs) == ours


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as messages with parts, as users of transformers write them."""
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = [{"type": "image"}] * turn.text.count(IMAGE_TAG)
        rest = turn.text.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, "")
        parts = [*parts, *([{"type": "text", "text": rest}] if rest else [])]
        messages.append({"role": "user" if turn.role == "human" else "assistant", "content": parts})
    return messages
