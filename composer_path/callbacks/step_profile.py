"""A trace of a few steps: what ran when on the CPU and on the GPU, for a viewer such as ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class StepProfile(Callback):
    """Writes `profile/rank<rank>-ba<step>.json.gz` into the run's folder, a file a rank, once a process.

    It holds names of operations, kernels and modules, and their times: no values, shapes or text. Steps that are
    watched take longer; the others aren't touched.

    Args:
        after: Steps of this process before the first that is watched: they compile, and allocate memory.
        steps: How many are watched, data loading between them included. A trace has some 10,000 lines a step.
    """

    is_run_object = True  # its keyword-only arguments come from the run, not from the YAML

    def __init__(self, after: int = 5, steps: int = 2, *, run_folder: Path) -> None:
        if after < 0 or steps < 1:
            found = f"found after {after} and steps {steps}"
            raise ValueError(f"callbacks.step_profile: after must be at least 0 and steps at least 1; {found}")
        self.after, self.steps, self.folder = after, steps, run_folder / FOLDER
        self.seen = 0
        self.profiler: profile | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin with the first step that is watched."""
        if self.seen == self.after:
            kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if state.device.name == "gpu" else [])
            self.profiler = profile(activities=kinds)
            self.profiler.start()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the trace after the last one."""
        self.seen += 1
        if self.profiler is not None and self.seen == self.after + self.steps:
            self.profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"rank{dist.get_global_rank()}-ba{state.timestamp.batch.value}.json.gz"
            self.profiler.export_chrome_trace(str(self.folder / name))
            self.profiler = None

    def close(self, state: State, logger: Logger) -> None:
        """Of a run that ends amid them, nothing is written."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
