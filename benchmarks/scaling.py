"""How cost grows: a step's time, its memory, and the loader's rate. Writes `results/scaling.json` and PNG plots.

python -m benchmarks.scaling [--quick]

Times are CPU seconds of our padding-free step (forward and backward pass, stage 2, one thread) with a 7B's proportions.
Memory is measured twice: the storages that autograd keeps at the end of the forward pass, and the growth of a fresh
process's peak over a whole step. The loader's rate is wall time, so it depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, interleaved, print_table, spread, write_result
from benchmarks.packed_step import packed_loss
from benchmarks.padded_step import set_checkpointing
from benchmarks.proportions import IMAGE_TOKENS, STAGES, build_proportioned_model, draw_sample
from benchmarks.step_speed import Variant, run_step
from composer_path import ComposerPathMLLM, PathMLLM
from composer_path.batches.batch import PackedCollator
from composer_path.batches.dataset import Sample

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTING = {"off": False, "full": True}
# Every larger block is mapped by itself and given back when it is freed, so that a peak is what was really in use.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# A batch is described by samples, text tokens of each, the share of them that is supervised, and images of each.
Shape = tuple[int, int, float, int]
SERIES: dict[str, dict[int | float, Shape]] = {
    "tokens in a batch": {count * 512: (count, 512 - IMAGE_TOKENS, 0.4, 1) for count in (1, 2, 4, 8)},
    "tokens of a sample, 2048 in the batch": {
        length: (2048 // length, length, 0.4, 0) for length in (128, 256, 512, 1024, 2048)
    },
    "images, 2048 tokens in the batch": {
        4 * count: (4, 512 - count * IMAGE_TOKENS, 0.4, count) for count in (0, 1, 2, 3)
    },
    "supervised share, 2048 tokens in the batch": {share: (4, 512, share, 0) for share in (0.05, 0.25, 0.5, 0.75, 1.0)},
}
QUICK: dict[str, dict[int | float, Shape]] = {"tokens in a batch": {256: (1, 128, 0.4, 1), 512: (2, 128, 0.4, 1)}}


def batch_of(shape: Shape, seed: int) -> list[Sample]:
    """Random samples of a shape."""
    count, text, share, num_images = shape
    generator = torch.Generator().manual_seed(seed)
    return [draw_sample(generator, index, text, max(1, int(share * text)), num_images) for index in range(count)]


def step_times(series: Mapping[str, Mapping[int | float, Shape]], repetitions: int) -> dict[str, Any]:
    """CPU seconds of a step for each shape, all shapes interleaved."""
    model = build_proportioned_model(STAGES["instructions"])
    run_step(model, batch_of((1, 64, 0.5, 1), 0), Variant())
    cases = {f"{name}|{value}": shape for name, shapes in series.items() for value, shape in shapes.items()}
    times: dict[str, list[float]] = {case: [] for case in cases}
    for repetition, case in interleaved(list(cases), repetitions):
        times[case].append(run_step(model, batch_of(cases[case], repetition), Variant()).seconds)
    return {
        name: [{"value": value, "cpu_seconds": spread(times[f"{name}|{value}"])} for value in shapes]
        for name, shapes in series.items()
    }


def saved_megabytes(model: PathMLLM, samples: Sequence[Sample]) -> float:
    """What lies in memory between forward and backward pass and didn't before, each storage once, in MB.

    Autograd's saved tensors are seen through its hooks; inputs of recomputed layers, which checkpointing keeps by
    itself, among Python's objects.
    """
    adapter = ComposerPathMLLM(model)
    batch = PackedCollator()(list(samples))
    before = set(living_storages())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = adapter.loss(adapter(batch), batch)
    kept = {address: size for address, size in (saved | living_storages()).items() if address not in before}
    del loss  # only now may a storage's address be used again
    return sum(kept.values()) / 1e6


def living_storages() -> dict[int, int]:
    """Address and bytes of every tensor that Python holds."""
    tensors = [one for one in gc.get_objects() if isinstance(one, Tensor) and one.layout == torch.strided]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def peak_growth(tokens: int, checkpointing: str) -> dict[str, float]:
    """In this fresh process: how far a step's peak lies over the model with its gradients, and what autograd kept, MB.

    A step on a single short sample comes first, so that gradients and libraries' buffers are there already.
    """
    model = build_proportioned_model(STAGES["instructions"])
    set_checkpointing(model, CHECKPOINTING[checkpointing])
    adapter = ComposerPathMLLM(model)
    packed_loss(adapter, PackedCollator()(batch_of((1, 64, 0.5, 1), 0)))
    samples = batch_of((tokens // 512, 512 - IMAGE_TOKENS, 0.4, 1), 1)
    batch = PackedCollator()(samples)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident_megabytes("VmRSS")
    packed_loss(adapter, batch)
    peak = resident_megabytes("VmHWM") - before
    return {"peak_growth_mb": round(peak, 1), "saved_mb": round(saved_megabytes(model, samples), 1)}


def resident_megabytes(field: str) -> float:
    """What Linux says about this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1.024e-3


def memory(token_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Memory against tokens, each in a fresh process."""
    rows = []
    for checkpointing in CHECKPOINTING:
        for tokens in token_counts:
            plan = json.dumps({"tokens": tokens, "checkpointing": checkpointing})
            found = subprocess.run(
                [sys.executable, "-m", "benchmarks.scaling", "--peak", plan],
                cwd=REPOSITORY,
                env=os.environ | ONE_THREAD,
                capture_output=True,
                check=True,
            )
            rows.append({"tokens": tokens, "checkpointing": checkpointing, **json.loads(found.stdout)})
    return rows


def loader_rates(workers: Sequence[int], num_records: int, repetitions: int) -> list[dict[str, Any]]:
    """Samples a second that the real loader yields, images decoded, at the demo's sizes; wall time."""
    from benchmarks.instruction_set import write_instruction_set
    from composer_path.batches.loader import build_dataloader
    from composer_path.images.pixels import IMAGE_MEAN
    from composer_path.records.vocabulary import load_tokenizer

    rates: dict[int, list[float]] = {count: [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        data = write_instruction_set(Path(folder), num_records, shorter=1)
        tokenizer = load_tokenizer(data.tokenizer)
        for _, count in interleaved([str(number) for number in workers], repetitions):
            loader = build_dataloader(
                dataset={"local": str(data.shards), "shuffle": False, "num_canonical_nodes": 1},
                global_batch_size=8,
                num_workers=int(count),
                persistent_workers=False,
                tokenizer=tokenizer,
                num_image_tokens=IMAGE_TOKENS,
                image_size=448,
                mean=IMAGE_MEAN,
            )
            batches = iter(loader.dataloader)
            next(batches)  # workers have started
            start = time.perf_counter()
            samples = sum(len(batch.num_images) for batch in batches)
            rates[int(count)].append(samples / (time.perf_counter() - start))
    return [{"workers": count, "samples_per_second": spread(found)} for count, found in rates.items()]


def per_token_kilobytes(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Slope of memory over tokens for each way of checkpointing, KB a token."""
    slopes = {}
    for checkpointing in CHECKPOINTING:
        points = [(row["tokens"], row[key]) for row in rows if row["checkpointing"] == checkpointing]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        slopes[checkpointing] = round(1000 * slope, 2)
    return slopes


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """One PNG for times, one for memory and loader."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, (name, points) in zip(axes.flat, result["step_time"].items(), strict=True):
        values = [point["value"] for point in points]
        spreads = [point["cpu_seconds"] for point in points]
        axis.plot(values, [one["median"] for one in spreads], "o-", color="#1f5a7a")
        low, high = ([one[key] for one in spreads] for key in ("quartile_1", "quartile_3"))
        axis.fill_between(values, low, high, color="#1f5a7a", alpha=0.2)
        axis.set(xlabel=name, ylabel="CPU s a step", ylim=(0, None))
    figure.savefig(folder / "scaling_time.png", dpi=110)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for checkpointing, color in zip(CHECKPOINTING, ("#1f5a7a", "#b5542b"), strict=True):
        rows = [row for row in result["memory"] if row["checkpointing"] == checkpointing]
        tokens = [row["tokens"] for row in rows]
        for key, style, words in (("peak_growth_mb", "o-", "peak of a step"), ("saved_mb", "s--", "kept by autograd")):
            label = f"{words}, checkpointing {checkpointing}"
            axes[0].plot(tokens, [row[key] for row in rows], style, color=color, label=label)
    axes[0].set(xlabel="tokens in a microbatch", ylabel="MB", ylim=(0, None))
    axes[0].legend(fontsize=7)
    workers = [str(row["workers"]) for row in result["loader"]]
    rates = [row["samples_per_second"]["median"] for row in result["loader"]]
    axes[1].bar(workers, rates, color="#1f5a7a")
    axes[1].set(xlabel="loader workers", ylabel="samples/s (448 px)")
    figure.savefig(folder / "scaling_memory_loader.png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few points; not written")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        print(json.dumps(peak_growth(**options.peak)))
        return 0
    quick = options.quick
    loader = loader_rates((0, 1) if quick else (0, 1, 2), 48 if quick else 240, 1 if quick else options.repetitions)
    rows = memory((512, 1024) if quick else (512, 1024, 2048, 4096))
    times = step_times(QUICK if quick else SERIES, 1 if quick else options.repetitions)
    slopes = {key: per_token_kilobytes(rows, key) for key in ("peak_growth_mb", "saved_mb")}
    for name, points in times.items():
        print()
        print_table((name, "CPU s"), [(point["value"], point["cpu_seconds"]["median"]) for point in points])
    print()
    keys = ("tokens", "checkpointing", "peak_growth_mb", "saved_mb")
    print_table(keys, [[row[key] for key in keys] for row in rows])
    print("\nKB a token:", slopes)
    print_table(("workers", "samples/s"), [(row["workers"], row["samples_per_second"]["median"]) for row in loader])
    if quick:
        return 0
    settings = {"threads": 1, "repetitions": options.repetitions, "stage": "instructions"}
    result = {"settings": settings, "step_time": times, "memory": rows, "kb_per_token": slopes, "loader": loader}
    write_result("scaling", result)
    plot(result, RESULTS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
