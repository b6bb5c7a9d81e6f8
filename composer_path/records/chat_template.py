"""A tokenizer's own chat template, rendered once with marks in place of all contents and cut at the marks.

What the template itself wrote may so be told from what a conversation says, which never forms a special token.
"""

from __future__ import annotations

import datetime
import re
import secrets
from typing import Any

# For templates that ask for today's date: tokens must not change overnight. LLaMA-3's own falls back on this day.
FIXED_DATE = "26 Jul 2024"
# In an exported folder's chat template, around what was the tokenizer's own.
OWN_STARTS, OWN_ENDS = "{# the tokenizer's own: #}", "{# its end #}"
# The template removes white space at the content's start, at its end.
Trim = tuple[bool, bool]


class TemplateError(ValueError):
    """A conversation that a template can't express, such as two questions in `plain`. Never holds its text."""


def render_around(roles: list[str], tokenizer: Any, date: str | datetime.date) -> tuple[list[str], list[Trim]]:
    """The template's own text around each message's content, and how it trims that content.

    `roles` are `system`, `user` or `assistant` of each message; `date` is what a template gets that asks for today's.

    Raises:
        TemplateError: The template refuses such a conversation, or doesn't write each message once and in order.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "template 'chat_template' needs a tokenizer that has one; this one has no chat_template (see its "
            "tokenizer_config.json), use 'llava_llama_2'"
        )
    # An em space on both sides tells whether the template trims contents; no template writes one itself.
    marks = [f"mark{index}x{secrets.token_hex(8)}" for index in range(len(roles))]
    messages = [{"role": role, "content": f"\u2003{mark}\u2003"} for role, mark in zip(roles, marks, strict=True)]
    day = read_date(date)
    template = fixed_template(own_template(tokenizer), day)
    date_string = day.strftime("%d %b %Y")  # what LLaMA-3's template looks for
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, date_string=date_string
        )
    except Exception as error:  # for example of a template without system messages; 1 / 0 is no error of jinja2's own
        raise TemplateError(
            f"the tokenizer's chat template refuses a conversation of the roles {', '.join(roles)}: {error}"
        ) from error
    # Alternately what the template wrote and a mark with what is left of its em spaces.
    pieces = re.split(f"(\u2003?(?:{'|'.join(marks)})\u2003?)", str(rendered))
    chunks, found = pieces[::2], pieces[1::2]
    if [piece.strip() for piece in found] != marks:
        raise TemplateError(
            f"the tokenizer's chat template must write each of the {len(marks)} messages once and in order, found "
            f"{len(found)} of them; use 'llava_llama_2' or change the tokenizer's chat template"
        )
    return chunks, [(not piece.startswith("\u2003"), not piece.endswith("\u2003")) for piece in found]


def own_template(tokenizer: Any) -> str:
    """The tokenizer's own chat template, also out of what an export wrote around it."""
    found: str = tokenizer.get_chat_template()
    inner = found.partition(OWN_STARTS)[2].rpartition(OWN_ENDS)[0]
    return inner or found


def trimmed(text: str, trim: Trim) -> str:
    """A content as the template leaves it."""
    text = text.lstrip() if trim[0] else text
    return text.rstrip() if trim[1] else text


def read_date(date: str | datetime.date) -> datetime.date:
    """A day from the words of a YAML."""
    if isinstance(date, datetime.date):
        return date
    for form in ("%d %b %Y", "%Y-%m-%d"):
        try:
            return datetime.datetime.strptime(date, form).date()
        except ValueError:
            continue
    raise ValueError(f'template.date: found {date!r}; write it as "26 Jul 2024" or "2024-07-26"')


def fixed_template(chat_template: str, date: datetime.date) -> str:
    """Write the date into the template; transformers 5 lets no function of ours take `strftime_now`'s place."""
    fixed = re.sub(
        r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(date.strftime(match[2])), chat_template
    )
    if re.search(r"strftime_now\s*\(", fixed):
        raise ValueError(
            "the tokenizer's chat template asks for today's date in a way that can't be replaced by template.date; "
            "write strftime_now's format as a plain string there"
        )
    return fixed
