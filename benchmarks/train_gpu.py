"""The 7B on one GPU, through the product's YAMLs: `python -m benchmarks.train_gpu`; `--tiny` runs every line on a CPU.

Random weights and made-up sets of the stages' lengths; nothing is downloaded. Each run is a process of its own. First
losses must agree before a rate is reported. MFU counts needed operations over the datasheet's rate (or `--peak`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_ceilings import measure_ceilings
from benchmarks.gpu_sets import TOKENIZER, write_stage_set
from benchmarks.instruction_set import REPOSITORY
from benchmarks.measure import RESULTS, print_table, write_result
from composer_path.planning.plan import PEAK_FLOPS

LLAMA_7B = (
    "{model_type: llama, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32, "
    "num_key_value_heads: 32, vocab_size: 32000, max_position_embeddings: 4096, rms_norm_eps: 1.0e-5}"
)
LLAMA_TINY = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 172, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, vocab_size: 32000, max_position_embeddings: 4096, rms_norm_eps: 1.0e-5}"
)
# Largest rows that leave room beside 16 bytes a trained weight on 141 GB; `composer-path plan` says so.
MOST_TOKENS = {"pretrain": 16384, "finetune": 4608}
BATCH = {"pretrain": 64, "finetune": 32}
OFF = ["execution.activation_checkpointing=off"]
FULL = ["execution.activation_checkpointing=full"]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "reference-like": ("padded", FULL),
    "ours, eager": ("ours", OFF),
    "ours, selective": ("ours", ["execution.activation_checkpointing=selective"]),
    "ours, compile": ("ours", [*OFF, "execution.fusion=compile", "execution.row_multiple=256"]),
    "ours, liger": ("ours", [*OFF, "execution.fusion=liger"]),
    "transformers, padding-free, liger": ("transformers", []),
}
# Of the first loss against ours in bf16, relative: rounding of another order of sums.
AGREEMENT = 5e-3


def overrides(stage: str, shards: Path, folder: Path, options: argparse.Namespace, variant: str) -> list[str]:
    """The product's YAML with random weights, a made-up set, and nothing saved."""
    batch = 4 if options.tiny else BATCH[stage]
    tokens = "null" if VARIANTS[variant][0] != "ours" else 4096 if options.tiny else MOST_TOKENS[stage]
    words = [
        f"save_root={folder / 'runs'}",
        f"tokenizer.path={TOKENIZER}",
        "model.vision_encoder.weights=null",
        "model.projector.weights=null",
        "model.language_model.path=null",
        f"model.language_model.config={LLAMA_TINY if options.tiny else LLAMA_7B}",
        f"train_loader.dataset={{local: {shards}, shuffle: false, num_canonical_nodes: 1}}",
        f"train_loader={{global_batch_size: {batch}, max_tokens_per_microbatch: {tokens}}}",
        f"train_loader.num_workers={0 if options.tiny else 8}",
        "eval_loader=null",
        "scheduler=null",
        "scheduler={name: constant}",
        "callbacks=null",
        "callbacks={speed_report: {window_size: 2}, memory_monitor: {}, batch_report: {}}",
        f"trainer.run_name={stage}_{variant.replace(', ', '_').replace(' ', '_')}",
        f"trainer={{max_duration: {options.steps + options.skip}ba, eval_interval: 1ep, save_interval: null}}",
        "trainer.autoresume=false",
    ]
    if options.tiny:
        words += [
            "model.vision_encoder={image_size: 64, kwargs: {embed_dim: 64, depth: 2, num_heads: 1}}",
            "model.projector.type=null",
            "model.projector.pooler={kind: reference, dim: 32, num_queries: 8, num_heads: 2}",
            "train_loader.timeout=0",
        ]
    return [*words, *VARIANTS[variant][1]]


def run_variant(stage: str, variant: str, shards: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run; a failure is part of the result."""
    plan = {
        "yaml": str(REPOSITORY / "yamls" / f"{stage}.yaml"),
        "overrides": overrides(stage, shards, folder, options, variant),
        "variant": VARIANTS[variant][0],
        "skip": options.skip,
        "folder": str(folder / "transformers"),
    }
    start = time.perf_counter()
    words = [sys.executable, "-m", "benchmarks.gpu_run", json.dumps(plan)]
    try:
        run = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {options.seconds} s"}
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(run.stdout.strip().splitlines()[-1]) | {"wall_s": round(time.perf_counter() - start, 1)}


def compare(stage: str, found: dict[str, dict[str, Any]], peak: float | None) -> None:
    """Add MFU and the speed over the reference-like run to those whose first loss agrees; print."""
    expected = found.get("ours, eager", {}).get("losses", [None])[0]
    base = found.get("reference-like", {}).get("samples_per_s")
    rows = []
    for name, report in found.items():
        if "failed" in report:
            rows.append([name, report["failed"][:60], "", "", ""])
            continue
        error = abs(report["losses"][0] / expected - 1) if expected else float("nan")
        report["first_loss_error"] = error
        if not error <= AGREEMENT:
            rows.append([name, f"first loss differs by {error:.1e}: no rate", "", "", ""])
            report["unequal"] = True
            continue
        report["mfu"] = report["needed_tflops"] * 1e12 / peak if peak else None
        report["speed_over_reference_like"] = report["samples_per_s"] / base if base else None
        cells = (report["samples_per_s"], report["mfu"], report["speed_over_reference_like"], report["peak_memory_gb"])
        rows.append([name, *("" if cell is None else cell for cell in cells)])
    print_table([stage, "samples/s", "MFU", "over reference-like", "peak GB"], rows)


def main() -> int:
    """Ceilings, then both stages in all variants; exit code 1 if ours didn't run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="small sizes that a CPU runs")
    parser.add_argument("--stages", nargs="+", default=["pretrain", "finetune"], choices=("pretrain", "finetune"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--skip", type=int, default=3, help="first steps that aren't")
    parser.add_argument("--seconds", type=int, default=240, help="that one run may take")
    parser.add_argument("--peak", type=float, help="FLOP/s of the GPU; by default the datasheet's")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_gpu"), help="for sets and runs")
    parser.add_argument(
        "--results", type=Path, help="folder; by default benchmarks/results, with --tiny that of --folder"
    )
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    results = options.results or (options.folder if options.tiny else RESULTS)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU; --tiny runs every line on a CPU")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = options.peak or next((flops for name, flops in PEAK_FLOPS.items() if name in (gpu or "")), None)
    result: dict[str, Any] = {
        "gpu": gpu,
        "tiny": options.tiny,
        "peak": peak,
        "ceilings": measure_ceilings(options.tiny),
    }
    print_table(list(result["ceilings"]), [list(result["ceilings"].values())])
    for stage in options.stages:
        batch = 4 if options.tiny else BATCH[stage]
        records = batch * (options.steps + options.skip)
        size, shorter = (64, 8) if options.tiny else (448, 1)
        shards = write_stage_set(options.folder / "sets", stage, records, size, shorter)
        found = {name: run_variant(stage, name, shards, options.folder, options) for name in options.variants}
        compare(stage, found, peak)
        result[stage] = found
        write_result("train_gpu", result, results)
    ours = [result[stage].get("ours, eager", {}) for stage in options.stages]
    return 1 if any("failed" in report for report in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
