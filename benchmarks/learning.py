"""Does our road learn as well as a plain one? 300 steps of the demo's stage 2, three data orders, held-out token loss.

python -m benchmarks.learning [--quick]

The plain one is a padded loop over the lazy JSON set with transformers' attention, loss and schedule; it shares the
start weights, the records and the settings with ours, and nothing of our data path, collator, loss or Trainer. First
both run some steps in the file's order: their losses and their held-out loss must agree to 1e-4, or nothing is written.
Then each seed gives both an order of their own. Ours passes when the mean of its held-out losses lies no farther from
the loop's mean than the loop's own seeds lie apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup

from benchmarks.instruction_set import IMAGES, REPOSITORY, demo_words, train_vocabulary
from benchmarks.measure import UnequalError, print_table, process_time, require_equal, write_result
from benchmarks.padded_step import PaddedModel, pad_samples
from benchmarks.trainer_runs import StepClock, finish_step, lazy_dataset
from composer_path.config.reading import load_config, plain
from composer_path.train import build_model

YAMLS = REPOSITORY / "yamls" / "demo"
TEST_DATA = REPOSITORY / "test_data"
# The demo's, but for a vocabulary of 512 pieces: the plain loop computes all logits, which would be most of its work.
LANGUAGE_MODEL = (
    "{model_type: llama, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 512, initializer_range: 0.08}"
)
SETS = {
    "captions": "captions.json",
    "heldout_captions": "heldout_captions.json",
    "train": "data.json",
    "heldout": "heldout.json",
}


def prepare(folder: Path) -> None:
    """The demo's shards, a small vocabulary, and stage 1, whose projector all runs start from."""
    if (folder / "complete").exists():
        return
    from composer_path.conversion.convert import convert
    from composer_path.train import train

    train_vocabulary(demo_words(), folder / "tokenizer")
    for name, file in SETS.items():
        convert(TEST_DATA / file, IMAGES, folder / "shards" / name)
    train(load_config(YAMLS / "pretrain.yaml", [*places(folder), "eval_loader=null"]))
    (folder / "complete").touch()


def places(folder: Path) -> list[str]:
    """Where a run finds its data and leaves its results."""
    return [
        f"save_root={folder}",
        f"variables.shards={folder}/shards",
        f"tokenizer.path={folder / 'tokenizer'}",
        "model.language_model=null",  # drop the demo's
        f"model.language_model.config={LANGUAGE_MODEL}",
        "trainer.autoresume=false",
        "callbacks.save_weights=null",
    ]


def finetune_config(folder: Path, steps: int, seed: int | None) -> Any:
    """The demo's stage 2 without augmentation; a seed orders the data (None: the file's order), the weights stay."""
    order = "shuffle: false" if seed is None else f"shuffle: true, shuffle_seed: {seed}"
    overrides = [
        *places(folder),
        f"model.projector.weights={folder}/pretrain/projector.safetensors",
        f"train_loader.dataset={{{order}}}",
        "algorithms=null",
        "algorithms={gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}",
        f"scheduler.t_warmup={warmup(steps)}ba",
        f"trainer={{max_duration: {steps}ba, eval_interval: {steps}ba, save_interval: 999ep}}",
        f"trainer.run_name=ours-{seed}-{steps}",
    ]
    config = load_config(YAMLS / "finetune.yaml", overrides)
    del config["callbacks"]["save_weights"]
    return config


def warmup(steps: int) -> int:
    """As in the YAML: a twentieth of the steps."""
    return max(1, steps // 20)


def run_ours(config: Any) -> dict[str, Any]:
    """The real road; losses of the steps and the held-out token loss after the last."""
    from composer_path.train import train

    clock = StepClock()
    seconds, trainer = process_time(lambda: train(config, callbacks=[clock]))
    heldout = float(trainer.state.eval_metrics["heldout"]["token_loss"].compute())
    return {"losses": clock.losses, "heldout_loss": heldout, "cpu_seconds": seconds}


def run_loop(config: Any, seed: int | None) -> dict[str, Any]:
    """The plain padded loop on the same start weights, with its own order."""
    settings = plain(config)
    steps = int(settings["trainer"]["max_duration"].removesuffix("ba"))
    dataset, heldout = (lazy_dataset(config, TEST_DATA / SETS[name]) for name in ("train", "heldout"))
    padded = PaddedModel(build_model(plain(config)), checkpointing=False)
    given = settings["optimizer"]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in padded.parameters() if parameter.requires_grad],
        lr=given["lr"],
        betas=tuple(given["betas"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"],
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup(steps), steps)

    def train() -> list[float]:
        losses = []
        batches = endless(dataset, settings["train_loader"]["global_batch_size"], seed)
        for step, batch in zip(range(steps), batches, strict=False):
            loss = padded(**batch)["loss"]
            loss.backward()
            finish_step(padded, optimizer)
            if step:  # Composer moves its schedule before it counts the batch: its rate is that of one step earlier
                schedule.step()
            losses.append(loss.item())
        return losses

    seconds, losses = process_time(train)
    return {"losses": losses, "heldout_loss": mean_token_loss(padded, heldout), "cpu_seconds": seconds}


def endless(dataset: Dataset[Any], batch_size: int, seed: int | None) -> Iterator[dict[str, Any]]:
    """Padded batches, epoch after epoch, each shuffled anew by the seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    while True:
        shuffled = seed is not None
        yield from DataLoader(dataset, batch_size, shuffle=shuffled, generator=generator, collate_fn=pad_samples)


@torch.no_grad()
def mean_token_loss(padded: PaddedModel, dataset: Dataset[Any]) -> float:
    """Mean cross entropy over all answer tokens of a set."""
    padded.eval()
    total, count = 0.0, 0
    for batch in DataLoader(dataset, 16, collate_fn=pad_samples):
        logits, labels = padded(**batch)["logits"][:, :-1], batch["labels"][:, 1:]
        total += nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


def check_same_start(folder: Path, steps: int) -> dict[str, float]:
    """Both in the file's order: the largest relative errors of losses and held-out loss.

    Raises:
        UnequalError: They are not the same training problem.
    """
    config = finetune_config(folder, steps, None)
    ours, loop = run_ours(config), run_loop(config, None)
    numbers = [
        {f"loss of step {step}": loss for step, loss in enumerate(found["losses"])}
        | {"held-out loss": found["heldout_loss"]}
        for found in (ours, loop)
    ]
    errors = require_equal("ours in the file's order", numbers[0], numbers[1], tolerance=1e-4)
    return {"losses": max(list(errors.values())[:-1]), "heldout_loss": errors["held-out loss"]}


def run_seed(folder: Path, steps: int, seed: int) -> None:
    """Both ways with a seed, into `seed-<seed>.json`."""
    config = finetune_config(folder, steps, seed)
    found = {"ours": run_ours(config), "loop": run_loop(config, seed)}
    (folder / f"seed-{seed}.json").write_text(json.dumps(found), encoding="utf-8")


def run_seeds(folder: Path, steps: int, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """All seeds side by side, each in a process of its own; what `run_ours` and `run_loop` report.

    A seed whose file lies in the folder is not run again.
    """
    started = []
    for seed in seeds:
        if not (folder / f"seed-{seed}.json").exists():
            plan = json.dumps({"folder": str(folder), "steps": steps, "seed": seed})
            command = [sys.executable, "-m", "benchmarks.learning", "--run", plan]
            started.append(subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    if any([process.wait() for process in started]):
        raise SystemExit("a seed's run failed")
    found = [json.loads((folder / f"seed-{seed}.json").read_text(encoding="utf-8")) for seed in seeds]
    return {who: [one[who] for one in found] for who in ("ours", "loop")}


def judge(ours: Sequence[float], loop: Sequence[float]) -> dict[str, Any]:
    """Means, the loop's range between seeds, and whether ours lies within it."""
    difference = statistics.mean(ours) - statistics.mean(loop)
    spread = max(loop) - min(loop)
    return {
        "mean_of_ours": statistics.mean(ours),
        "mean_of_loop": statistics.mean(loop),
        "difference_of_means": difference,
        "loops_range_between_seeds": spread,
        "within": abs(difference) <= spread,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 4 steps, one seed; not written")
    parser.add_argument("--folder", help="keep everything here; an interrupted command goes on with what is missing")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.run:
        run_seed(Path(options.run["folder"]), options.run["steps"], options.run["seed"])
        return 0
    steps, seeds, gate_steps = (4, (1,), 3) if options.quick else (300, (1, 2, 3), 20)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        prepare(folder)
        try:
            errors = check_same_start(folder, gate_steps)
        except UnequalError as error:
            print(error, file=sys.stderr)
            return 1
        runs = run_seeds(folder, steps, seeds)
    heldout = {who: [round(run["heldout_loss"], 5) for run in found] for who, found in runs.items()}
    verdict = judge(heldout["ours"], heldout["loop"])
    print_table(("seed", "ours", "loop"), list(zip(seeds, heldout["ours"], heldout["loop"], strict=True)))
    print(verdict)
    if options.quick:
        return 0
    write_result(
        "learning",
        {
            "threads": 1,
            "settings": {
                "steps": steps,
                "seeds": seeds,
                "yaml": "yamls/demo/finetune.yaml",
                "batch_size": 8,
                "language_model": LANGUAGE_MODEL,
            },
            "equal_in_the_files_order": {"steps": gate_steps, "largest_relative_error": errors},
            "heldout_token_loss": heldout,
            "verdict": verdict,
            "cpu_seconds": {who: [round(run["cpu_seconds"], 1) for run in found] for who, found in runs.items()},
            "train_losses": {
                who: [[round(loss, 4) for loss in run["losses"]] for run in found] for who, found in runs.items()
            },
        },
    )
    return 0 if verdict["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
