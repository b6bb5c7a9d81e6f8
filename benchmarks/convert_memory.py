"""Memory of a conversion of text-only records: growth of each process over its imports, for several input sizes.

python -m benchmarks.convert_memory [--list] [records ...]     (default: 200000 2000000)

JSONL is streamed: its growth must not depend on the number of records. `--list` measures a JSON list, which is read
whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.measure import write_result

COMMAND = Path(__file__).resolve().parent.parent / "data_prep" / "convert.py"
LIMIT_MB = 300


def write_records(path: Path, num_records: int, as_list: bool) -> None:
    with open(path, "w") as file:
        file.write("[" if as_list else "")
        for i in range(num_records):
            question, answer = f"Question {i}: " + "what is seen? " * 5, f"Answer {i}: " + "mostly glands. " * 10
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            record = {"id": f"case-{i}", "patient": f"P{i // 10}", "source": "made", "conversations": turns}
            file.write(("," if as_list and i else "") + json.dumps(record) + "\n")
        file.write("]" if as_list else "")


def imports_mb() -> float:
    """Resident memory of a process that has only imported what a conversion needs."""
    code = "import composer_path.conversion.convert, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) / 1e6


def peaks_mb(arguments: list[str]) -> list[float]:
    """Run a conversion and return the highest resident memory of each of its processes."""
    process = subprocess.Popen([sys.executable, str(COMMAND), *arguments], stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        try:
            for one in [root, *root.children(recursive=True)]:
                peaks[one.pid] = max(peaks.get(one.pid, 0), one.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit("the conversion failed")
    return sorted(peaks.values(), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true", help="a JSON list in place of JSONL")
    parser.add_argument("records", nargs="*", type=int, default=[200_000, 2_000_000])
    options = parser.parse_args()
    base = imports_mb()
    print(f"imports: {base:.0f} MB")
    rows = []
    for num_records in options.records:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.json" if options.list else "data.jsonl")
            write_records(data, num_records, options.list)
            start = time.perf_counter()
            words = ["--data", str(data), "--images", folder, "--out", f"{folder}/out", "--workers", "2"]
            growth = peaks_mb(words)[0] - base
            seconds = time.perf_counter() - start
            size = data.stat().st_size / 1e6
        print(f"{num_records} records, {size:.0f} MB: {growth:.0f} MB over imports, {seconds:.0f} s", flush=True)
        rows.append({"records": num_records, "input_mb": round(size), "growth_mb": round(growth)})
        if growth > LIMIT_MB and not options.list:
            raise SystemExit(f"more than {LIMIT_MB} MB")
    name = "convert_memory_list" if options.list else "convert_memory"
    print(write_result(name, {"workers": 2, "imports_mb": round(base), "limit_mb": LIMIT_MB, "inputs": rows}))


if __name__ == "__main__":
    main()
