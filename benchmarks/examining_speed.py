"""What it costs that pictures are examined in a process of their own, against the same function in this one.

python -m benchmarks.examining_speed [--quick]

CPU time of both processes counts, of JPEGs of a megapixel, in turns. The first picture, for which it starts, is
counted apart.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved, paired_ratio, print_table, spread, write_result
from benchmarks.tissue_images import QUALITY, SIDE, write_tissue_images
from composer_path.images import examiner
from composer_path.images.file import examine_image

APART = examiner.Examiner()


def examine_apart(files: Sequence[bytes]) -> None:
    for data in files:
        APART.examine(data)


def examine_here(files: Sequence[bytes]) -> None:
    for data in files:
        examine_image(data)


WAYS: dict[str, Callable[[Sequence[bytes]], None]] = {"a process of its own": examine_apart, "this one": examine_here}


def cpu_seconds() -> float:
    """User and system time of this process and of the one that examines."""
    ticks = 0
    for process in examiner._idle:
        fields = Path(f"/proc/{process._process.pid}/stat").read_bytes().rpartition(b")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[Sequence[bytes]], None], files: Sequence[bytes]) -> float:
    before = cpu_seconds()
    work(files)
    return cpu_seconds() - before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="20 images, one repetition; writes no result")
    options = parser.parse_args(arguments)
    count, repetitions = (20, 1) if options.quick else (200, 7)
    with tempfile.TemporaryDirectory() as folder:
        result = measure([path.read_bytes() for path in write_tissue_images(Path(folder), count)], repetitions)
    if not options.quick:
        print(write_result("examining_speed", result))


def measure(files: Sequence[bytes], repetitions: int) -> dict[str, Any]:
    start = timed(examine_apart, files[:1])
    if any(APART.examine(data).data != examine_image(data).data for data in files[:20]):
        raise SystemExit("what is stored depends on where a picture is examined; no time is reported")
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _, name in interleaved(list(WAYS), repetitions):
        times[name].append(timed(WAYS[name], files))
    per_image = {name: 1000 * spread(found)["median"] / len(files) for name, found in times.items()}
    ratio = paired_ratio(times["a process of its own"], times["this one"])
    print_table(["examined in", "CPU ms / image"], [[name, value] for name, value in per_image.items()])
    print_table(["ratio of CPU time", "median"], [["own process : this one", ratio["median"]]])
    print_table(["to start", "CPU s"], [["the first picture", start]])
    size = sum(map(len, files)) // len(files)
    settings = {"images": len(files), "side": SIDE, "quality": QUALITY, "bytes_per_image": size}
    settings |= {"repetitions": repetitions}
    found = {"cpu_ms_per_image": per_image, "ratio_of_cpu": ratio, "cpu_seconds_to_start": round(start, 3)}
    return {"settings": settings, **found}


if __name__ == "__main__":
    main()
