"""Ask an exported model about images; a model that takes no question captions them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from composer_path.commands.verb import add_import, at_least_1, import_given

LEAST, MOST = 0.001, 1000  # temperatures beyond which logits leave fp32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its images and the question."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="written by export or at a run's end")
    add("words", metavar="QUESTION", nargs="*", help="in quotes; read from the terminal with --chat")
    add("--image", type=Path, action="append", default=[], help="may be repeated, in the tags' order")
    add("--system", help="instead of the template's system message")
    add("--chat", action="store_true", help="keep asking; an empty line ends")
    add("--max-new-tokens", type=at_least_1, default=512, help="an answer is cut there (default: 512)")
    add_import(parser)
    add("--temperature", type=float, default=0.0, help="0 always takes the likeliest (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Print the answers, token by token."""
    if len(options.words) > 1:
        raise ValueError(f"found {len(options.words)} questions; give one, in quotes, and more with --chat")
    question = " ".join(options.words).strip()
    if not (question or options.chat or options.image):
        raise ValueError("give a question, or --chat to be asked for one")
    if not (options.temperature == 0 or LEAST <= options.temperature <= MOST):
        raise ValueError(f"--temperature: must be 0, or from {LEAST} to {MOST}, found {options.temperature}")

    from transformers import TextStreamer

    from composer_path.asking.assistant import Assistant
    from composer_path.records.conversation import Turn
    from composer_path.records.messages import conversation_of

    import_given(options)
    assistant = Assistant.from_pretrained(options.model)
    images = [assistant.read_image(path) for path in options.image]
    tokenizer: Any = assistant.tokenizer  # transformers annotates the streamer's argument with a factory class
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generation: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "streamer": streamer}
    if options.temperature > 0:
        generation |= {"do_sample": True, "temperature": options.temperature}
    if not (question or options.chat):
        assistant.caption(images, **generation)
        return 0
    turns: list[tuple[str, str]] = []
    while question := question or (_next_question() if options.chat else ""):
        if not turns:  # what is said later leaves the pictures where they were
            question = conversation_of([Turn("human", question)], len(images)).turns[0].text
        turns.append(("human", question))
        turns.append(("assistant", assistant.answer(turns, images, system=options.system, **generation)))
        question = ""
    return 0


def _next_question() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
