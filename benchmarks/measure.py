"""Measuring: interleaved process times, their paired ratios, the equality that comes first, and the result's file."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "mosaicml",
    "mosaicml-streaming",
    "accelerate",
    "timm",
    "torchvision",
    "pillow",
    "simplejpeg",
)


class UnequalError(RuntimeError):
    """Two variants that should compute the same don't: their times must not be compared."""


def require_equal(
    name: str, found: Mapping[str, float], expected: Mapping[str, float], tolerance: float = 1e-5
) -> dict[str, float]:
    """The relative error of each number.

    Args:
        name: Of the variant, for the message.
        found: Its numbers, such as loss and gradient norm.
        expected: Those of the variant it is compared to.
        tolerance: The largest relative error.

    Raises:
        UnequalError: An error is larger than the tolerance, or not a number.
    """
    errors = {key: abs(found[key] - value) / max(abs(value), 1e-12) for key, value in expected.items()}
    for key, error in errors.items():
        if not error <= tolerance:
            raise UnequalError(
                f"'{name}': {key} is {found[key]!r}, expected {expected[key]!r}: relative error {error:.1e}, allowed "
                f"{tolerance:.0e}; no time is reported"
            )
    return errors


def interleaved(names: Sequence[str], repetitions: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """(repetition, name), each repetition in an order of its own: slow moments of the machine hit all alike."""
    shuffle = random.Random(seed)
    for repetition in range(repetitions):
        yield from ((repetition, name) for name in shuffle.sample(list(names), len(names)))


def process_time(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of CPU time that a call took in this process (other processes' load doesn't count), and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Ratios of times that belong together: their median, quartiles and all of them."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return spread(ratios) | {"all": [round(ratio, 4) for ratio in ratios]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    words = ("quartile_1", "median", "quartile_3")
    found = dict(zip(words, quartiles, strict=True)) | {"lowest": min(values), "highest": max(values)}
    return {key: round(value, 4) for key, value in found.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, versions, what else the machine did, and the date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "load_average": round(os.getloadavg()[1], 1),  # of the last five minutes: other work on these cores
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """`<name>.json` with the machine it was measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    return path


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns of equal width; numbers with three decimals."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
