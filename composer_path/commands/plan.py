"""Say what memory, time and money a run takes, before it starts.

Exit code: 0 it fits, 1 it doesn't fit, 2 a mistake.
"""

from __future__ import annotations

import argparse

from composer_path.commands.verb import add_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, the machine, and what samples are like."""
    add_yaml(parser)
    parser.add_argument("--gpus", type=int, default=8, help="over all nodes (default: 8)")
    parser.add_argument("--gpu-memory", default="80GB", help="of one GPU, such as 80GB or 141GB (default: 80GB)")
    parser.add_argument("--gpu", choices=("A100", "H100", "H200"), default="H100", help="(default: H100)")
    parser.add_argument("--tokens", type=int, default=700, help="of a sample, images included (default: 700)")
    parser.add_argument("--answers", type=int, default=200, help="answer tokens of a sample (default: 200)")
    parser.add_argument("--images", type=int, default=1, help="of a sample on average (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of the peak that is used (default: 0.45)")
    parser.add_argument("--samples", type=int, help="of the whole run: says hours")
    parser.add_argument("--price", type=float, help="of a GPU for an hour: says the cost")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    from composer_path.config.reading import load_config

    for flag, least in (("gpus", 1), ("tokens", 1), ("answers", 1), ("images", 0)):
        if (value := getattr(options, flag)) < least:
            raise ValueError(f"--{flag}: found {value}; it must be at least {least}")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu: found {options.mfu}; it must lie between 0 and 1")
    config = load_config(options.yaml, options.words)

    from composer_path.planning.plan import PEAK_FLOPS, Machine, SampleSize, make_plan, parse_memory
    from composer_path.planning.report import format_plan

    machine = Machine(options.gpus, parse_memory(options.gpu_memory), PEAK_FLOPS[options.gpu])
    plan = make_plan(config, machine, SampleSize(options.tokens, options.answers, options.images))
    print(format_plan(plan, mfu=options.mfu, samples=options.samples, price=options.price))
    return 0 if plan.fitting else 1
