"""A real run of one step, made of a user's YAML: its loss and gradients.

It writes into a folder that is removed, and leaves out evaluation, checkpoints, callbacks and clipping. As a command it
is one of the ranks that share the step: `composer -n 2 -m composer_path.planning.one_step YAML OUT.pt fp64 key=value`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_path.config.reading import load_config, plain
from composer_path.models.pattern import MODULES
from composer_path.train import train
from composer_path.weights.torch_file import read_torch_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

_FOLDER = "COMPOSER_PATH_ONE_STEP_FOLDER"  # where ranks that were started together write


@dataclass
class Step:
    """What a step came to."""

    loss: float = math.nan
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by the parameter's name, on the CPU
    samples: list[int] = field(default_factory=list)
    microbatches: int = 0
    without_image: int = 0  # of them

    def norms(self, other: Step | None = None) -> dict[str, float]:
        """The norm of each module's gradients, or of their difference from another step's; NaN where one is missing."""
        squares: dict[str, float] = {}
        for name, gradient in self.gradients.items():
            if other is not None:
                twin = other.gradients.get(name)
                square = math.nan if twin is None else float((gradient.double() - twin.double()).norm()) ** 2
            else:
                square = float(gradient.double().norm()) ** 2
            module = name.split(".")[0]
            squares[module] = squares.get(module, 0.0) + square
        return {module: math.sqrt(squares[module]) for module in MODULES if module in squares}


class StepWitness(Callback):
    """Notes a step's loss, gradients, samples and microbatches; all ranks' together."""

    def __init__(self, one_sample: bool, fp64: bool) -> None:
        self.one_sample, self.fp64, self.step = one_sample, fp64, Step()

    def init(self, state: State, logger: Logger) -> None:
        """Take more digits, if asked to, before the model is sharded."""
        if self.fp64:
            state.model.double()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Cut into single samples, if asked to; compute exactly where the GPU would round to fewer bits."""
        torch.set_float32_matmul_precision("highest")
        if self.one_sample:
            state.device_train_microbatch_size = 1

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the samples."""
        mine = [sample for sample in state.batch.sample_ids.tolist() if sample >= 0]
        self.step.samples = sorted(sample for ids in dist.all_gather_object(mine) for sample in ids)

    def before_forward(self, state: State, logger: Logger) -> None:
        """Note a microbatch."""
        self.step.microbatches += 1
        self.step.without_image += len(state.batch.is_he) == 0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Note the gradients, whole; they lie on rank 0."""
        for name, parameter in state.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            if dist.get_global_rank() == 0:
                self.step.gradients[name.removeprefix("module.").removeprefix("model.")] = whole.detach().cpu().clone()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the loss and all ranks' microbatches."""
        self.step.loss = float(state.total_loss_dict["loss/train/total"])
        counts = dist.all_gather_object((self.step.microbatches, self.step.without_image))
        self.step.microbatches, self.step.without_image = map(sum, zip(*counts, strict=True))


def step_here(yaml: str, words: Sequence[str], one_sample: bool = False, fp64: bool = False) -> Step:
    """Compute it in this process.

    Args:
        yaml: Of the run.
        words: Overrides.
        one_sample: Each microbatch is a single sample, whatever the YAML allows.
        fp64: Weights and products have 64 bits; of a YAML in fp32.
    """
    witness = StepWitness(one_sample, fp64)
    with tempfile.TemporaryDirectory() as own:
        config = one_step(load_config(yaml, words), os.environ.get(_FOLDER, own))
        if fp64:
            config.model.attention = "sdpa"  # others know 16 bits only
            if (parallelism := config.trainer.parallelism_config) and parallelism.fsdp:
                parallelism.fsdp.mixed_precision = {}  # casts nothing
        with contextlib.redirect_stderr(io.StringIO()):  # its own lines
            train(config, callbacks=[witness])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return witness.step


def one_step(config: DictConfig, folder: str) -> DictConfig:
    """The configuration of a run of one step, which leaves what it writes in a folder."""
    settings = plain(config)
    for section in ("tokenizer", "model", "train_loader"):  # may name files below save_root
        config[section] = settings[section]
    config.save_root = folder
    config.eval_loader, config.callbacks, config.loggers = None, {}, {}
    config.eval_loaders, config.eval_metrics, config.train_metrics = {}, {}, {}
    config.algorithms = {name: given for name, given in settings["algorithms"].items() if name != "gradient_clipping"}
    alone = {"run_name": "one_step", "max_duration": "1ba", "save_interval": None, "best": None, "autoresume": False}
    for key, value in (alone | {"progress_bar": False, "load_path": None}).items():
        config.trainer[key] = value
    return config


def step_of_ranks(yaml: str, words: Sequence[str], ranks: int, fp64: bool = False) -> Step:
    """Compute it in processes of Composer's launcher; ValueError where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.pt")
        command = [
            sys.executable,
            "-m",
            "composer_path.guards.launch",
            "-n",
            str(ranks),
            "-m",
            __name__,
            yaml,
            str(out),
        ]
        command.append("fp64" if fp64 else "as given")
        environment = os.environ | {_FOLDER: folder}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
        if done.returncode or not out.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if "Error: " in line]
            raise ValueError(f"{ranks} ranks ended early: {said[-1].strip() if said else f'code {done.returncode}'}")
        return Step(**read_torch_file(out, values=True))


def main(yaml: str, out: str, bits: str, *words: str) -> None:
    """Be a rank of `step_of_ranks`; rank 0 writes the step."""
    step = step_here(yaml, words, fp64=bits == "fp64")
    if dist.get_global_rank() == 0:
        torch.save(vars(step), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
