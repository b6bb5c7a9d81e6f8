"""Say what memory, time and money a run takes, before it starts.

Exit code: 0 it fits, 1 it doesn't fit or so many GPUs can't share the batch, 2 a mistake.
"""

from __future__ import annotations

import argparse

from composer_path.commands.verb import add_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, the machine, and what samples are like."""
    add_yaml(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="over all nodes (default: 8)")
    add("--gpu-memory", default="80GB", help="of one GPU, such as 80GB or 141GB (default: 80GB)")
    add("--gpu", choices=("A100", "H100", "H200"), default="H100", help="(default: H100)")
    add("--tokens", type=int, default=700, help="of a sample, images included (default: 700)")
    add("--answers", type=int, default=200, help="answer tokens of a sample (default: 200)")
    add("--images", type=int, default=1, help="of a sample on average (default: 1)")
    add("--mfu", type=float, default=0.45, help="share of the peak that is used (default: 0.45)")
    add("--samples", type=int, help="of the whole run: says hours")
    add("--price", type=float, help="of a GPU for an hour: says the cost")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    from composer_path.config.reading import load_config

    for flag, least in {"gpus": 1, "tokens": 1, "answers": 1, "images": 0, "samples": 1, "price": 0}.items():
        if (value := getattr(options, flag)) is not None and not value >= least:  # nan is no number either
            raise ValueError(f"--{flag}: must be at least {least}, found {value}")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu: must lie between 0 and 1, found {options.mfu}")
    config = load_config(options.yaml, options.words, allowed_imports=options.allowed_imports)

    from composer_path.planning.plan import PEAK_FLOPS, Machine, SampleSize, make_plan, parse_memory
    from composer_path.planning.report import format_plan

    machine = Machine(options.gpus, parse_memory(options.gpu_memory), PEAK_FLOPS[options.gpu])
    plan = make_plan(config, machine, SampleSize(options.tokens, options.answers, options.images))
    print(format_plan(plan, mfu=options.mfu, samples=options.samples, price=options.price))
    return 0 if plan.fitting and plan.problem is None else 1
