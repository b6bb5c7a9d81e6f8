"""Conversion of JPEGs of a megapixel against a bare MDSWriter and against loops that only decode them.

python -m benchmarks.convert_speed [--quick] [--images FOLDER]

Every variant runs in a process of its own, in an order that is shuffled anew each repetition; CPU time of that process
and its children counts, from after its imports to the published index, verification included. Before anything is
timed, what is read back is compared with the files. Wall clock counts only for `--workers`, beside the load average.
`COMPOSER_PATH_HISTOLOGY` may name a folder of pictures to crop; `--images` keeps the crops for another run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved, paired_ratio, print_table, spread, write_result
from benchmarks.tissue_images import QUALITY, SIDE, write_tissue_images

REPOSITORY = Path(__file__).resolve().parent.parent
PR_SET_CHILD_SUBREAPER = 36
# Ratio of speeds: (variant, compared with, at least)
TARGETS = [
    ("convert --check header", "MDSWriter, the files' bytes", 0.7),
    ("convert --check full", "only decoding", 0.9),
    ("convert --check full", "MDSWriter, PIL images as jpeg", 2.0),
    ("convert --check full", "MDSWriter, PIL images as pil", 2.0),
]
TURNS = [{"from": "human", "value": "<image>\nWhich tissue is shown?"}, {"from": "assistant", "value": "Stroma."}]


def record_of(number: int) -> dict[str, Any]:
    return {"id": f"case-{number}", "image": f"{number:05}.jpg", "conversations": TURNS}


def write_records(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps(record_of(number)) + "\n" for number in range(count)))


def convert_files(folder: Path, out: Path, check: str, workers: int = 1) -> None:
    from composer_path.conversion.convert import convert

    convert(folder / "data.jsonl", folder, out, check=check, workers=workers, ids="keep")


def write_with_mds(folder: Path, out: Path, kind: str) -> None:
    """Streaming's own writer: the files' bytes, or decoded images in its encodings `jpeg` and `pil`."""
    from PIL import Image
    from streaming import MDSWriter

    columns = {"conversation": "json", "id": "str", "images": kind, "metadata": "json"}
    with MDSWriter(out=str(out), columns=columns, hashes=["xxh64"], size_limit="64mb") as writer:
        for line in (folder / "data.jsonl").read_text().splitlines():
            record = json.loads(line)
            data = (folder / record["image"]).read_bytes()
            image = data if kind == "bytes" else Image.open(folder / record["image"]).convert("RGB")
            row = {"conversation": {"turns": record["conversations"]}, "id": record["id"], "images": image}
            writer.write({**row, "metadata": {"images": [record["image"]]}})


def decode_only(folder: Path, decoder: str) -> None:
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    for path in sorted(folder.glob("*.jpg")):
        if decoder == "torchvision":
            decode_jpeg(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), mode=ImageReadMode.RGB)
        else:
            Image.open(path).load()


VARIANTS: dict[str, Callable[[Path, Path], None]] = {
    "convert --check header": lambda folder, out: convert_files(folder, out, "header"),
    "convert --check full": lambda folder, out: convert_files(folder, out, "full"),
    "MDSWriter, the files' bytes": lambda folder, out: write_with_mds(folder, out, "bytes"),
    "MDSWriter, PIL images as jpeg": lambda folder, out: write_with_mds(folder, out, "jpeg"),
    "MDSWriter, PIL images as pil": lambda folder, out: write_with_mds(folder, out, "pil"),
    "decoding with torchvision": lambda folder, out: decode_only(folder, "torchvision"),
    "decoding with PIL": lambda folder, out: decode_only(folder, "pil"),
}
WORKERS = {f"--workers {number}": number for number in (1, 2)}  # on as many cores


def run_variant(name: str, folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds (this process and its children) and wall seconds; called in a process of its own."""
    import streaming  # noqa: F401 (not timed)
    import torchvision  # noqa: F401

    import composer_path.conversion.convert  # noqa: F401

    adopt_orphans()
    before, start = os.times(), time.perf_counter()
    if name in WORKERS:
        # One process has threads of its own for images, so it is the cores that are counted out.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: WORKERS[name]])
        convert_files(folder, out, "full", WORKERS[name])
    else:
        VARIANTS[name](folder, out)
    wall = time.perf_counter() - start
    end_examiners()
    after = os.times()
    # User and system time, of this process and of its children; what follows is the clock.
    return {"cpu": sum(after[:4]) - sum(before[:4]), "wall": wall}


def adopt_orphans() -> None:
    """Become the parent of whatever a child leaves behind, so that its CPU time counts, too; Linux knows how."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_examiners() -> None:
    """End the processes in which pictures were examined, and wait for them and those of other processes."""
    from composer_path.images import examiner

    while examiner._idle:
        examiner._idle.pop().end()
    with suppress(ChildProcessError):
        while True:
            os.wait()


def timed(name: str, folder: Path) -> dict[str, float]:
    """Run a variant in a process of its own, into a new folder that is deleted again."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.convert_speed", "--variant", name, str(folder), f"{scratch}/out"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def check_equality(folder: Path, count: int) -> dict[str, int]:
    """Compare what is read back with the files: stored JPEGs bit for bit, also those of `MDSWriter`."""
    from composer_path.shards.view import ShardView

    found = {}
    for name in ("convert --check header", "convert --check full", "MDSWriter, the files' bytes"):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "out")
            VARIANTS[name](folder, out)
            images = stored_images(out) if "MDS" in name else [sample.images[0] for sample in samples(ShardView(out))]
            files = [(folder / f"{number:05}.jpg").read_bytes() for number in range(count)]
            if images != files:
                raise SystemExit(f"'{name}': what is read back isn't what went in; no time is reported")
            found[name] = len(images)
    return found


def samples(view: Any) -> list[Any]:
    return [sample for number in range(len(view.shards)) for sample in view.samples(number)]


def stored_images(folder: Path) -> list[bytes]:
    """The column `images` of a set of shards, by Streaming's own reader."""
    from streaming.base.format import reader_from_json

    index = json.loads((folder / "index.json").read_text())
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    return [reader[number]["images"] for reader in readers for number in range(len(reader))]


def compare(times: dict[str, list[float]]) -> tuple[dict[str, Any], str]:
    """Ratios of speeds for each target, and which decoder is the faster one."""
    decoders = [name for name in times if name.startswith("decoding")]
    fastest = min(decoders, key=lambda name: sorted(times[name])[len(times[name]) // 2])
    ratios = {}
    for name, other, target in TARGETS:
        other_times = times[fastest if other == "only decoding" else other]
        ratio = paired_ratio(other_times, times[name])
        ratios[f"{name} : {other}"] = {"target": target, "reached": ratio["median"] >= target, **ratio}
    return ratios, fastest


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="60 images, one repetition; writes no result")
    parser.add_argument("--images", type=Path, help="folder that keeps the images for another run")
    parser.add_argument("--variant", nargs=3, metavar=("NAME", "FOLDER", "OUT"), help="used for its child processes")
    options = parser.parse_args(arguments)
    if options.variant:
        name, folder, out = options.variant
        print(json.dumps(run_variant(name, Path(folder), Path(out))))
        return
    count, repetitions = (60, 1) if options.quick else (2000, 3)
    folder = options.images or Path(tempfile.mkdtemp())
    try:
        result = measure(folder, count, repetitions)
        if not options.quick:
            print(write_result("convert_speed", result))
    finally:
        if options.images is None:
            shutil.rmtree(folder)


def measure(folder: Path, count: int, repetitions: int) -> dict[str, Any]:
    paths = write_tissue_images(folder, count)
    write_records(folder / "data.jsonl", count)
    num_bytes = sum(path.stat().st_size for path in paths)
    equal = check_equality(folder, count)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _, name in interleaved(list(VARIANTS), repetitions):
        times[name].append(timed(name, folder)["cpu"])
    ratios, fastest = compare(times)
    walls: dict[str, list[float]] = {name: [] for name in WORKERS}
    loads: list[float] = []
    for _, name in interleaved(list(WORKERS), repetitions):
        loads.append(os.getloadavg()[0])
        walls[name].append(timed(name, folder)["wall"])
    growth = paired_ratio(walls["--workers 1"], walls["--workers 2"])
    cpu = {name: {"images_per_cpu_second": count / spread(found)["median"]} for name, found in times.items()}
    print_table(["variant", "images / CPU s"], [[name, row["images_per_cpu_second"]] for name, row in cpu.items()])
    print_table(["ratio of speeds", "median", "target"], [[n, r["median"], r["target"]] for n, r in ratios.items()])
    print_table(["--workers 2 : 1", "median"], [["wall clock", growth["median"]]])
    return {
        "settings": {"images": count, "side": SIDE, "quality": QUALITY, "bytes": num_bytes, "repetitions": repetitions},
        "images_read_back_equal": equal,
        "fastest_decoder": fastest,
        "ratios_of_speed": ratios,
        "cpu": cpu,
        "workers": {"speed_2_to_1": growth, "wall_seconds": walls, "load_average_before": loads},
    }


if __name__ == "__main__":
    main()
