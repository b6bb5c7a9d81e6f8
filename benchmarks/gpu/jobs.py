"""Pieces of work in their order, each within its time, and the file that holds what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.variants import REPOSITORY
from benchmarks.measure import write_result

LEAST_SECONDS = 15.0  # what is left of the call's time, with which a job is begun
LOG_LINES = 40  # of a failed job


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: Of its result.
        task: What `benchmarks.gpu.work` gets; `work` names the module.
        not_run: Why it isn't begun here.
    """

    name: str
    task: dict[str, Any] = field(default_factory=dict)
    not_run: str | None = None


@dataclass
class Results:
    """What is known, written out after each job.

    Attributes:
        folder: Of `gpu.json`, and of `gpu.log` with the last lines of jobs that failed.
        about: Machine, sizes, plans.
        jobs: Results by name.
    """

    folder: Path
    about: dict[str, Any]
    jobs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Results:
        """What lies in a folder, or nothing yet."""
        path = folder / "gpu.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return cls(folder, found.get("about", {}), found.get("jobs", {}))

    def has(self, name: str) -> bool:
        """Whether a job has ended well."""
        return name in self.jobs and not {"failed", "not_run"} & self.jobs[name].keys()

    def write(self) -> None:
        """Everything, with this machine."""
        write_result("gpu", {"about": self.about, "jobs": self.jobs}, self.folder)


def run_job(job: Job, scratch: Path, seconds: float, log: Path) -> dict[str, Any]:
    """A job's result; why there is none is part of it (`failed`, `not_run`).

    Args:
        job: To run, in a process of its own, which is killed with all of its children when its time is over.
        scratch: For the task, the result and the output.
        seconds: Its time.
        log: Gets the last lines of a job that failed.
    """
    if job.not_run is not None:
        return {"not_run": job.not_run}
    if seconds < LEAST_SECONDS:
        return {"failed": "not begun: the call's time is over; the same call goes on here"}
    folder = scratch / "jobs" / job.name.replace(": ", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    task, result, output = folder / "task.json", folder / "result.json", folder / "output.txt"
    result.unlink(missing_ok=True)
    task.write_text(json.dumps(job.task))
    words = [sys.executable, "-m", "benchmarks.gpu.work", str(task), str(result)]
    start = time.perf_counter()
    with output.open("w") as stream:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    found: dict[str, Any] = _read(result)
    if code is None:
        found["failed"] = f"took longer than {seconds:.0f} s"
    elif code and "failed" not in found:
        found["failed"] = f"ended with exit code {code}"
    elif not found:
        found["failed"] = "left no result"
    if "failed" in found:
        lines = output.read_text(errors="replace").splitlines()[-LOG_LINES:]
        with log.open("a") as stream:
            stream.write("\n".join([f"== {job.name}: {found['failed']}", *lines, ""]))
    return found | {"wall_s": round(time.perf_counter() - start, 1)}


def _end_group(process: subprocess.Popen) -> None:
    """Kill what a job left running, itself included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):  # cut while it was written
        return {}
