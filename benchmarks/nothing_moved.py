"""Proof that a change of the inside moved nothing outside: the same demo in two checkouts, compared bit for bit.

`python -m benchmarks.nothing_moved BEFORE AFTER` goes the demo's road in each checkout (its code, its YAMLs) and
compares shards and data cards byte for byte, the loss of every step of both stages, all weights that are left, and what
an export writes. Runs of one checkout are kept in `--work`, so that the second of two comparisons costs half.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETS = {
    "captions": ("captions", []),
    "train": ("data", []),
    "heldout_captions": ("heldout_captions", []),
    "heldout": ("heldout", []),
    "resized": ("captions", ["--resize", "112", "--size-limit", "1mb"]),
    "kept": ("data", ["--ids", "keep", "--check", "header", "--size-limit", "256kb"]),
}


def go(checkout: Path, work: Path) -> Path:
    """Convert, train both stages and export in a checkout; returns the folder of all results."""
    out = work / checkout.name
    if (out / "complete").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def run(*words: Any) -> None:
        subprocess.run([sys.executable, *map(str, words)], cwd=checkout, env=environment, check=True)

    for name, (records, options) in SETS.items():
        data = ["--data", f"test_data/{records}.json", "--images", "test_data/imgs", "--key", work / "identifiers.key"]
        run("data_prep/convert.py", *data, "--out", out / "shards" / name, "--workers", 1, *options)
    for stage in ("pretrain", "finetune"):
        places = [f"save_root={out}", f"variables.shards={out}/shards", "loggers.tensorboard.flush_interval=1"]
        run("train.py", f"yamls/demo/{stage}.yaml", *places)
    export = ["export", out / "finetune/checkpoints/latest", out / "exported"]
    run("-c", "import sys; from composer_path.cli import main; sys.exit(main(sys.argv[1:]))", *export)
    (out / "complete").touch()
    return out


def step_losses(run_folder: Path) -> dict[int, float]:
    """The loss of every step, as TensorBoard keeps it (fp32)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for file in sorted(run_folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss/train/total" in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars("loss/train/total")}
    return losses


def differences(before: Path, after: Path) -> Iterator[str]:
    """What isn't the same, one line each."""
    for name in SETS:
        files = [
            {path.relative_to(root).as_posix(): stored(path) for path in sorted(root.rglob("*")) if path.is_file()}
            for root in (before / "shards" / name, after / "shards" / name)
        ]
        yield from (
            f"shards/{name}/{file}: differs"
            for file in sorted({*files[0], *files[1]})
            if len({one.get(file) for one in files}) > 1
        )
    for stage in ("pretrain", "finetune"):
        losses = [step_losses(root / stage) for root in (before, after)]
        if not losses[0] or losses[0] != losses[1]:
            moved = [step for step in losses[0] if losses[0][step] != losses[1].get(step)]
            first = min(moved, default=-1)
            yield f"{stage}: {len(moved)} of {len(losses[0])} step losses differ, the first at step {first}"
    for file in ("pretrain/projector.safetensors", "finetune/model/model.safetensors", "exported/model.safetensors"):
        tensors = [dict(read_tensors(root / file)) for root in (before, after)]
        moved = [key for key in {*tensors[0], *tensors[1]} if tensors[0].get(key) != tensors[1].get(key)]
        if moved or not tensors[0]:
            yield f"{file}: {len(moved)} of {len(tensors[0])} tensors differ"
    configs = [json.loads((root / "exported/config.json").read_text()) for root in (before, after)]
    if configs[0] != configs[1]:
        yield "exported/config.json: differs"


def stored(file: Path) -> bytes:
    """Its bytes, without the times of a checkout's image files, which a conversion keeps to notice changed ones."""
    data = file.read_bytes()
    return re.sub(rb'"stamp": *"\w*"', b"", data) if file.name == "done.json" else data


def read_tensors(file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], bytes]]]:
    """Name, dtype, shape and bytes of each tensor of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, (entry["dtype"], tuple(entry["shape"]), data[8 + length + start : 8 + length + stop])


def main() -> int:
    """Compare and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/nothing_moved"), help="where both leave their results")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    before, after = (go(checkout.resolve(), work) for checkout in (options.before, options.after))
    found = list(differences(before, after))
    counts = {stage: len(step_losses(after / stage)) for stage in ("pretrain", "finetune")}
    print("\n".join(found) if found else f"nothing moved: {len(SETS)} sets, losses of {counts} steps, all tensors")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
