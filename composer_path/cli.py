"""The command `composer-path`: plan, export, ask, evaluate, summary."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; mistakes of the user end in one line and exit code 2."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from files
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"composer-path {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130  # what a shell reports of a program that was interrupted


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 on a mistake."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse closes optional positionals at the first flag: `ask MODEL --image a.jpg "question"` leaves one word over
    if options.verb == "ask" and options.question is None and len(rest) == 1 and not rest[0].startswith("-"):
        options.question = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="composer-path", description="Plan a training run, and use what it left.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    plan = verbs.add_parser("plan", help="memory, time and cost of a training run, before it starts")
    plan.add_argument("yaml", type=Path, help="the run's YAML")
    plan.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    plan.add_argument("--gpus", type=int, default=8, help="over all nodes")
    plan.add_argument("--gpu-memory", default="80GB", help="of one GPU, such as 80GB or 141GB")
    plan.add_argument("--gpu", choices=("A100", "H100", "H200"), default="H100")
    plan.add_argument("--tokens", type=int, default=700, help="of a sample on average, images included")
    plan.add_argument("--answers", type=int, default=200, help="answer tokens of a sample on average")
    plan.add_argument("--images", type=int, default=1, help="of a sample on average")
    plan.add_argument("--mfu", type=float, default=0.45, help="share of the peak that is assumed to be used")
    plan.add_argument("--samples", type=int, help="of the whole run: says hours")
    plan.add_argument("--price", type=float, help="of a GPU for an hour: says the cost")
    plan.set_defaults(run=_plan)

    export = verbs.add_parser("export", help="write a model folder from a checkpoint")
    export.add_argument("checkpoint", type=Path, help="a run's checkpoint or its latest-rank0.pt")
    export.add_argument("out", type=Path, help="folder to write")
    export.add_argument("--config", type=Path, help="the run's config.yaml; by default the one beside the checkpoints")
    export.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights; by default as trained")
    export.set_defaults(run=_export)

    ask = verbs.add_parser("ask", help="ask an exported model about images")
    ask.add_argument("model", type=Path, help="a folder written by export, or a finetuning run's model folder")
    ask.add_argument("question", nargs="?", help="read from the terminal with --chat")
    ask.add_argument(
        "--image", type=Path, action="append", default=[], help="may be repeated, in the order of the tags"
    )
    ask.add_argument("--system", help="instead of the template's system message")
    ask.add_argument("--chat", action="store_true", help="keep asking; an empty line ends")
    ask.add_argument("--max-new-tokens", type=int, default=512)
    ask.add_argument("--temperature", type=float, default=0.0, help="0, the default, always takes the likeliest token")
    ask.set_defaults(run=_ask)

    evaluate = verbs.add_parser("evaluate", help="ask closed questions, with their images and with blank ones")
    evaluate.add_argument("model", type=Path)
    evaluate.add_argument("--data", type=Path, required=True, help="records whose meta has options and answer")
    evaluate.add_argument("--images", type=Path, required=True, help="folder of their images")
    evaluate.set_defaults(run=_evaluate)

    summary = verbs.add_parser("summary", help="a table of the runs below a folder")
    summary.add_argument("root", type=Path, help="their save_root")
    summary.set_defaults(run=_summary)
    return parser


def _plan(options: argparse.Namespace) -> int:
    from composer_path.config.reading import load_config
    from composer_path.planning.plan import PEAK_FLOPS, Machine, SampleSize, make_plan, parse_memory
    from composer_path.planning.report import format_plan

    counts = {
        "--gpus": options.gpus,
        "--tokens": options.tokens,
        "--answers": options.answers,
        "--images": options.images,
    }
    for flag, value in counts.items():
        if value < (0 if flag == "--images" else 1):
            raise ValueError(f"{flag}: found {value}; it must be at least {0 if flag == '--images' else 1}")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu: found {options.mfu}; it must lie between 0 and 1")
    machine = Machine(options.gpus, parse_memory(options.gpu_memory), PEAK_FLOPS[options.gpu])
    config = load_config(options.yaml, options.overrides)
    plan = make_plan(config, machine, SampleSize(options.tokens, options.answers, options.images))
    print(format_plan(plan, mfu=options.mfu, samples=options.samples, price=options.price))
    return 0 if plan.fitting else 1


def _export(options: argparse.Namespace) -> int:
    from composer_path.config.reading import load_config
    from composer_path.run.export import export_checkpoint
    from composer_path.run.report import CONFIG

    # checkpoints/<name> lies in the run's folder; a latest link may point anywhere, so it isn't followed here
    config_path = options.config or options.checkpoint.absolute().parent.parent / CONFIG
    if not config_path.is_file():
        raise ValueError(f"no run configuration at '{config_path}'; give it with --config")
    export_checkpoint(options.checkpoint, load_config(str(config_path), []), options.out, options.dtype)
    print(f"model folder: {options.out}")
    return 0


def _ask(options: argparse.Namespace) -> int:
    if not (options.question or "").strip() and not options.chat:
        raise ValueError("give a question, or --chat to be asked for one")
    from transformers import TextStreamer

    from composer_path.asking.assistant import Assistant

    assistant = Assistant.from_pretrained(options.model)
    tokenizer: Any = assistant.tokenizer  # transformers annotates the streamer's argument with a factory class
    images = [assistant.read_image(path) for path in options.image]
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    )
    turns: list[tuple[str, str]] = []
    question = options.question or _next_question()
    while question:
        turns.append(("human", question))
        answer = assistant.answer(
            turns,
            images,
            system=options.system,
            max_new_tokens=options.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        turns.append(("assistant", answer))
        question = _next_question() if options.chat else ""
    return 0


def _next_question() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _evaluate(options: argparse.Namespace) -> int:
    from composer_path.asking.closed_questions import compare_with_blank, read_closed_questions

    questions = read_closed_questions(options.data)
    if not options.images.is_dir():
        raise ValueError(f"--images {options.images}: there is no such folder")

    from composer_path.asking.assistant import Assistant
    from composer_path.asking.run_table import EVALUATION, format_closed
    from composer_path.weights.folder import write_json

    comparison = compare_with_blank(Assistant.from_pretrained(options.model), questions, options.images)
    print(format_closed(comparison))
    write_json(options.model / EVALUATION, comparison)
    return 0


def _summary(options: argparse.Namespace) -> int:
    from composer_path.asking.run_table import format_runs

    print(format_runs(options.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
