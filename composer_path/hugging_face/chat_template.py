"""The Jinja template of an exported folder: writes a conversation as training did.

Of the tokenizer's own template all stands between two parts of ours: the first makes the messages what training made of
them, the second cuts where an answer would begin. Which template an exported model uses: the training set's; of a
mixture's streams the one that is named for asking, or that all share (`asking_template` of batches/mixture.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from composer_path.hugging_face.spelling import BORDER, NOTHING, spelled_out
from composer_path.records.chat_template import OWN_ENDS, OWN_STARTS, fixed_template, own_template, read_date
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.prompts import ChatTemplate, LlavaLlama2Template, PlainTemplate
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import TextEncoder

_MARK = "\ue003answer\ue003"  # where the answer would begin; no text has it, as it is private, too
# Messages whose contents are strings: escaped text, and the image token where an image stands.
_CONTENTS = """
{%- macro spelled(text) -%}
{%- set told = namespace(text=text) -%}
{%- for old, new in SPELLED -%}{%- set told.text = told.text.replace(old, new) -%}{%- endfor -%}
{{- told.text -}}
{%- endmacro -%}
{%- set ns = namespace(messages=[], system=false) -%}
{%- for message in messages -%}
{%- set turn = namespace(lines=[], images=0, text='') -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'user' -%}
{%- set turn.images = message['content'].split(TAG) | length - 1 -%}
{%- for part in message['content'].split(TAG) -%}{%- set turn.lines = turn.lines + [spelled(part)] -%}{%- endfor -%}
{%- set turn.text = turn.lines | join(IMAGE) -%}
{%- else -%}{%- set turn.text = spelled(message['content']) -%}{%- endif -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{%- set turn.images = turn.images + 1 -%}{%- set turn.lines = turn.lines + [IMAGE] -%}
{%- elif part['type'] == 'text' -%}{%- set turn.lines = turn.lines + [spelled(part['text'])] -%}
{%- else -%}{{- raise_exception('a part of a message must be text or an image, found ' + part['type']) -}}{%- endif -%}
{%- endfor -%}
{%- set turn.text = turn.lines | join('\\n') -%}
{%- endif -%}
{%- if turn.images and message['role'] != 'user' -%}
{{- raise_exception('images must stand in messages of the user, found one of ' + message['role']) -}}
{%- endif -%}
{%- if turn.images and FRONT -%}
{%- set rest = turn.text.replace(IMAGE, '').strip() -%}
{%- set turn.text = ([IMAGE] * turn.images) | join('\\n') + ('\\n' + rest if rest else '') -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = true -%}{%- endif -%}
{%- set content = GUARD + turn.text + GUARD if turn.text else '' -%}
{%- set ns.messages = ns.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
"""
_PLAIN = """
{%- for message in ns.messages -%}
{%- if message['role'] == 'user' -%}{{- BOS -}}
{{- ([IMAGE] * (message['content'].split(IMAGE) | length - 1)) | join('\\n') -}}
{%- elif message['role'] == 'assistant' -%}{{- BORDER + message['content'] + '\\n' -}}{%- endif -%}
{%- endfor -%}
"""
_LLAMA_2 = """
{%- set told = namespace(system=spelled(SYSTEM)) -%}
{%- for message in ns.messages -%}
{%- if message['role'] == 'system' -%}{%- set told.system = message['content'] -%}
{%- elif message['role'] == 'user' -%}
{{- BOS + '[INST] ' + ('<<SYS>>\\n' + told.system + '\\n<</SYS>>\\n\\n' if told.system else '') -}}
{{- message['content'] + ' [/INST]' -}}
{%- set told.system = '' -%}
{%- else -%}{{- BORDER + ' ' + message['content'] + ' ' + EOS -}}{%- endif -%}
{%- endfor -%}
"""
_BEFORE_OWN = """
{%- if SYSTEM is not none and not ns.system -%}
{%- set ns.messages = [{'role': 'system', 'content': spelled(SYSTEM)}] + ns.messages -%}
{%- endif -%}
{%- set asked = add_generation_prompt -%}
{%- set answer = [{'role': 'assistant', 'content': MARK}] if asked else [] -%}
{%- set answers = namespace(messages=[]) -%}
{%- for message in ns.messages + answer -%}
{%- set content = (BORDER if message['role'] == 'assistant' else '') + message['content'] -%}
{%- set answers.messages = answers.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = answers.messages -%}
{%- set add_generation_prompt = false -%}
{%- set date_string = DATE -%}
{%- set rendered %}"""
_AFTER_OWN = """{% endset -%}
{%- set said = namespace(text=rendered) -%}
{%- if THINKING -%}{%- set said.text = said.text.replace('<think>\\n\\n</think>\\n\\n', '') -%}{%- endif -%}
{%- if BORDER -%}{%- set said.text = said.text.replace(' ' + BORDER, BORDER + ' ') -%}{%- endif -%}
{%- if asked -%}
{%- set said.text = said.text.split(MARK)[0] -%}
{%- if BORDER -%}{%- set said.text = said.text.rsplit(BORDER, 1)[0] -%}
{%- elif said.text.endswith(' ') -%}{%- set said.text = said.text[:-1] -%}{%- endif -%}
{%- endif -%}
{{- said.text -}}
"""


@dataclass(frozen=True)
class Writing:
    """How a template's string is written, beside what training did.

    Args:
        image: The image token.
        border: Keep tokens from reaching across the place where an answer begins; for tokenizers that would.
        guard: Keep the blanks at a content's ends; for tokenizers whose special tokens take them.
    """

    image: str
    border: bool = False
    guard: bool = False


def chat_template_of(text: TextPreparation, encoder: TextEncoder, writing: Writing) -> str | None:
    """The Jinja template of a text preparation; None for a template of one's own, which only Python can write."""
    template, tokenizer = text.template, encoder.tokenizer
    special = [token for token in encoder.special_tokens if not token.isspace()]
    thinking = isinstance(template, ChatTemplate) and template.thinking
    if thinking:
        special = [token for token in special if token not in ("<think>", "</think>")]
    constants: dict[str, Any] = {
        "SPELLED": spelled_out([*special, writing.image]),
        "TAG": IMAGE_TAG,
        "IMAGE": writing.image,
        "FRONT": text.image_position == "front",
        "GUARD": NOTHING if writing.guard else "",
        "BORDER": BORDER if writing.border else "",
        "BOS": tokenizer.bos_token or "",
        "EOS": tokenizer.eos_token or "",
        "SYSTEM": getattr(template, "system", None),
        "THINKING": thinking,
        "MARK": _MARK,
    }
    if isinstance(template, PlainTemplate):
        return _set(constants) + _CONTENTS + _PLAIN.rstrip()
    if isinstance(template, LlavaLlama2Template):
        constants["SYSTEM"] = template.system or ""
        return _set(constants) + _CONTENTS + _LLAMA_2.rstrip()
    if isinstance(template, ChatTemplate):
        day = read_date(template.date)
        own = OWN_STARTS + fixed_template(own_template(tokenizer), day) + OWN_ENDS
        constants["DATE"] = day.strftime("%d %b %Y")
        return (_set(constants) + _CONTENTS + _BEFORE_OWN).rstrip() + own + _AFTER_OWN.rstrip()
    return None


def _set(constants: dict[str, Any]) -> str:
    """Constants as Jinja says them: JSON, but for null and booleans, which it takes in lower case alike."""
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in constants.items()]
    return "".join(lines)


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=True)
