"""One piece of work in a process of its own: `python -m benchmarks.gpu.work TASK.json RESULT.json`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Report = Callable[[Mapping[str, Any]], None]


def main(task_file: str, result_file: str) -> int:
    """Run the module that the task names and write its result, or why there is none beside what was known before."""
    known: dict[str, Any] = {}

    def report(result: Mapping[str, Any]) -> None:
        known.update(result)
        Path(result_file).write_text(json.dumps(known))

    try:
        task = json.loads(Path(task_file).read_text())
        run = importlib.import_module(f"benchmarks.gpu.{task['work']}").run
        report(run(task, report) if "report" in inspect.signature(run).parameters else run(task))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        report({"failed": f"{type(error).__name__}: {first}"[:300]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
