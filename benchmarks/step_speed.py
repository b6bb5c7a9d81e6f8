"""Forward and backward pass of our step against a reference-like one, lever by lever, on one CPU thread.

python -m benchmarks.step_speed [--quick]

For each suite (captions: stage 1; instructions and mixture: stage 2) every variant runs on the same random batches with
the same weights, in an order that is shuffled anew each repetition. Loss and gradient norm must agree to 1e-5, on a
small batch before anything is timed and again in each timed step; if they don't, nothing is written. Ratios only
are reported: a CPU's seconds say nothing about a GPU's. Collating is not timed, as both do it in loader workers; the
optimizer's step is the same for all and left out; end_to_end.py has both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measure import (
    UnequalError,
    interleaved,
    paired_ratio,
    print_table,
    process_time,
    require_equal,
    spread,
    write_result,
)
from benchmarks.packed_step import given_features, packed_loss
from benchmarks.padded_step import PaddedModel, pad_samples, padded_loss, set_checkpointing, with_normalized_images
from benchmarks.proportions import STAGES, build_proportioned_model, draw_batch
from composer_path import ComposerPathMLLM, PathMLLM
from composer_path.batches.batch import PackedCollator
from composer_path.batches.dataset import Sample

TARGETS = {"captions": 1.4, "instructions": 1.8}
BASELINE, OURS = "reference-like", "ours"


@dataclass(frozen=True)
class Variant:
    """How a step is made.

    Attributes:
        packed: Padding-free, or padded to the longest sample.
        checkpointing: The language model's layers recompute their activations.
        all_logits: Logits at every position, or at answer tokens only.
        features_given: The vision encoder's output comes with the data.
    """

    packed: bool = True
    checkpointing: bool = False
    all_logits: bool = False
    features_given: bool = False


VARIANTS = {
    BASELINE: Variant(packed=False, checkpointing=True, all_logits=True),
    "padded, no checkpointing": Variant(packed=False, all_logits=True),
    "padding-free, checkpointing": Variant(checkpointing=True, all_logits=True),
    "padding-free, no checkpointing": Variant(all_logits=True),
    OURS: Variant(),
    "ours, features given": Variant(features_given=True),
}


@dataclass(frozen=True)
class Outcome:
    """What a step took and computed."""

    seconds: float
    loss: float
    gradient_norm: float

    def numbers(self) -> dict[str, float]:
        """What must be equal."""
        return {"loss": self.loss, "gradient_norm": self.gradient_norm}


def run_step(model: PathMLLM, samples: Sequence[Sample], variant: Variant, max_tokens: int | None = None) -> Outcome:
    """One timed step on a batch that is collated before."""
    model.zero_grad(set_to_none=True)
    if not variant.packed:
        padded = PaddedModel(model, variant.checkpointing)
        batch = pad_samples(with_normalized_images(samples, model))
        seconds, loss = process_time(partial(padded_loss, padded, batch))
        return Outcome(seconds, loss, gradient_norm(model))
    set_checkpointing(model, variant.checkpointing)
    adapter = ComposerPathMLLM(model)
    row = PackedCollator(max_tokens)(list(samples))
    if variant.features_given:
        with given_features(model, row) as row:
            seconds, loss = process_time(partial(packed_loss, adapter, row, all_logits=variant.all_logits))
    else:
        seconds, loss = process_time(partial(packed_loss, adapter, row, all_logits=variant.all_logits))
    return Outcome(seconds, loss, gradient_norm(model))


def gradient_norm(model: PathMLLM) -> float:
    """Of all trained parameters together."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def compare(
    suite: str,
    variants: dict[str, Variant],
    *,
    batch_size: int,
    repetitions: int,
    max_tokens: int | None = None,
    image_size: int = 448,
    shorter: int = 1,
    llama: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Time the variants on the same batches.

    Args:
        suite: `captions`, `instructions` or `mixture`.
        variants: By name; the first is what the others are compared with.
        batch_size: Samples in a device batch.
        repetitions: Each with a batch of its own.
        max_tokens: Of a padding-free microbatch.
        image_size: In pixels.
        shorter: Divides the text's lengths.
        llama: Keys of the language model's configuration that differ.

    Raises:
        UnequalError: A variant computes something else than the first.
    """
    model = build_proportioned_model(STAGES[suite], image_size=image_size, llama=llama)
    errors = dict.fromkeys(variants, 0.0)

    def check(outcomes: dict[str, Outcome]) -> None:
        expected = outcomes[next(iter(variants))].numbers()
        for name, outcome in outcomes.items():
            worst = max(require_equal(f"{suite}: {name}", outcome.numbers(), expected).values())
            errors[name] = max(errors[name], worst)

    gate = draw_batch(suite, 2, seed=999, image_size=image_size, shorter=4)
    check({name: run_step(model, gate, variant, max_tokens) for name, variant in variants.items()})
    batches = [draw_batch(suite, batch_size, seed, image_size, shorter) for seed in range(repetitions)]
    outcomes: list[dict[str, Outcome]] = [{} for _ in batches]
    for repetition, name in interleaved(list(variants), repetitions):
        outcomes[repetition][name] = run_step(model, batches[repetition], variants[name], max_tokens)
        if len(outcomes[repetition]) == len(variants):
            check(outcomes[repetition])
    times = {name: [outcome[name].seconds for outcome in outcomes] for name in variants}
    first = next(iter(variants))
    return {
        "batch_size": batch_size,
        "max_tokens_per_microbatch": max_tokens,
        "repetitions": repetitions,
        "padded_over_real_tokens": spread([padded_tokens(batch) / real_tokens(batch) for batch in batches]),
        "mean_tokens": round(sum(map(real_tokens, batches)) / (batch_size * repetitions), 1),
        "variants": {
            name: {
                "speed_over_first": paired_ratio(times[first], times[name]),
                "cpu_seconds": spread(times[name]),
                "largest_relative_error": errors[name],
            }
            for name in variants
        },
    }


def real_tokens(samples: Sequence[Sample]) -> int:
    """Of a device batch."""
    return sum(len(sample["input_ids"]) for sample in samples)


def padded_tokens(samples: Sequence[Sample]) -> int:
    """The same when padded to the longest."""
    return len(samples) * max(len(sample["input_ids"]) for sample in samples)


def frozen_against_trained(
    *, batch_size: int, repetitions: int, shorter: int = 1, image_size: int = 448
) -> dict[str, Any]:
    """Time of a caption step with a frozen language model over that with a trained one (both padding-free)."""
    suites = ("captions", "instructions")
    frozen, trained = (build_proportioned_model(STAGES[suite], image_size=image_size) for suite in suites)
    for model in (frozen, trained):
        run_step(model, draw_batch("captions", 1, seed=999, image_size=image_size), Variant())
    times: dict[str, list[float]] = {"frozen": [], "trained": []}
    losses: dict[str, list[float]] = {"frozen": [], "trained": []}
    for repetition, name in interleaved(list(times), repetitions):
        batch = draw_batch("captions", batch_size, repetition, image_size, shorter)
        outcome = run_step({"frozen": frozen, "trained": trained}[name], batch, Variant())
        times[name].append(outcome.seconds)
        losses[name].append(outcome.loss)
    for one, other in zip(losses["frozen"], losses["trained"], strict=True):
        require_equal("frozen language model", {"loss": one}, {"loss": other})
    return {
        "batch_size": batch_size,
        "repetitions": repetitions,
        "time_over_trained": paired_ratio(times["frozen"], times["trained"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: short texts, small batches; not written")
    parser.add_argument("--repetitions", type=int, default=7)
    quick = (options := parser.parse_args(arguments)).quick
    torch.set_num_threads(1)
    sizes = {"captions": 16, "instructions": 8, "mixture": 8}
    keywords: dict[str, Any] = {"repetitions": 2 if quick else options.repetitions, "shorter": 4 if quick else 1}
    try:
        suites = {
            suite: compare(
                suite,
                VARIANTS,
                batch_size=4 if quick else size,
                max_tokens=None if suite == "captions" else 4096,
                **keywords,
            )
            for suite, size in sizes.items()
        }
        frozen = frozen_against_trained(batch_size=4 if quick else 16, **keywords)
    except UnequalError as error:
        print(error, file=sys.stderr)
        return 1
    for suite, found in suites.items():
        print(f"\n{suite}: {found['mean_tokens']:.0f} tokens a sample, {found['batch_size']} samples a batch")
        rows = [
            (
                name,
                row["speed_over_first"]["median"],
                row["speed_over_first"]["quartile_1"],
                row["speed_over_first"]["quartile_3"],
                f"{row['largest_relative_error']:.0e}",
            )
            for name, row in found["variants"].items()
        ]
        print_table(("variant", "speed", "quartile 1", "quartile 3", "largest error"), rows)
    print(f"\nfrozen language model: {frozen['time_over_trained']['median']:.3f} of a trained one's time")
    if not quick:
        write_result("step_speed", {"threads": 1, "targets": TARGETS, "suites": suites, "frozen": frozen})
        missed = [
            suite
            for suite, target in TARGETS.items()
            if suites[suite]["variants"][OURS]["speed_over_first"]["median"] < target
        ]
        if missed:
            print(f"below the target: {', '.join(missed)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
