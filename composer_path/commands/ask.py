"""Ask an exported model about images; a model that takes no question captions them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its images and the question."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="written by export or at a run's end")
    parser.add_argument("words", metavar="QUESTION", nargs="*", help="in quotes; read from the terminal with --chat")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated, in the tags' order")
    parser.add_argument("--system", help="instead of the template's system message")
    parser.add_argument("--chat", action="store_true", help="keep asking; an empty line ends")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="an answer is cut there (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Print the answers, token by token."""
    if len(options.words) > 1:
        raise ValueError(f"found {len(options.words)} questions; give one, in quotes, and more with --chat")
    question = options.words[0].strip() if options.words else ""
    if not (question or options.chat or options.image):
        raise ValueError("give a question, or --chat to be asked for one")

    from transformers import TextStreamer

    from composer_path.asking.assistant import Assistant

    assistant = Assistant.from_pretrained(options.model)
    if not question and not options.chat and assistant.takes_question:
        raise ValueError("give a question, or --chat to be asked for one")
    images = [assistant.read_image(path) for path in options.image]
    tokenizer: Any = assistant.tokenizer  # transformers annotates the streamer's argument with a factory class
    generation: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    generation["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if options.temperature > 0:
        generation |= {"do_sample": True, "temperature": options.temperature}
    if not question and not options.chat:
        assistant.caption(images, **generation)
        return 0
    turns: list[tuple[str, str]] = []
    question = question or _next_question()
    while question:
        turns.append(("human", question))
        turns.append(("assistant", assistant.answer(turns, images, system=options.system, **generation)))
        question = _next_question() if options.chat else ""
    return 0


def _next_question() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
