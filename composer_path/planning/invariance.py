"""One step of a YAML's run, computed in other ways that must not matter: losses and gradients compared.

A step's result may not depend on how its samples are cut into microbatches, what is kept for the backward pass, who
reads the samples or how many ranks share them. Where fp32 differs by more than it should, the two are computed again
in fp64, in which rounding vanishes and a fault stays.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from composer_path.config.reading import load_config, plain
from composer_path.models.pattern import learning_modules
from composer_path.planning.one_step import Step, step_here, step_of_ranks
from composer_path.run.precision import compute_dtype

# Largest relative difference. bf16 keeps 8 bits of a number, and other sums round otherwise.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-2}
FSDP = "trainer.parallelism_config.fsdp"


@dataclass(frozen=True)
class Way:
    """A way to compute the step."""

    what: str
    words: tuple[str, ...] = ()  # overrides
    one_sample: bool = False  # each microbatch is a single sample
    ranks: int = 1


@dataclass(frozen=True)
class Row:
    """What a way came to, beside the YAML's own."""

    way: Way
    step: Step | None = None
    differences: Mapping[str, float] = field(default_factory=dict)  # relative; of loss and trained modules' gradients
    in_fp64: Mapping[str, float] = field(default_factory=dict)  # the same, where fp32 differed
    why: str = ""  # there are none

    @property
    def worst(self) -> float:
        """The largest, of the more exact ones; NaN counts as infinite."""
        return largest(self.in_fp64 or self.differences)


def largest(differences: Mapping[str, float]) -> float:
    """The largest difference; NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else value for value in differences.values()), default=0.0)


def ways_of(settings: Mapping[str, Any], ranks: int) -> Iterator[Way]:
    """Ways to compute a step of these settings, each with one thing changed; the first is the YAML's own."""
    yield Way("as given")
    loader, execution = settings["train_loader"], settings["execution"]
    given, least = loader["max_tokens_per_microbatch"], loader["dataset"]["max_seq_len"]
    for tokens in dict.fromkeys((max(least, (given or 2 * least) // 2), least)):
        if tokens != given:
            yield Way(f"max_tokens_per_microbatch: {tokens}", (f"train_loader.max_tokens_per_microbatch={tokens}",))
    yield Way("one sample a microbatch", one_sample=True)
    kinds = {"activation_checkpointing": "off", "fusion": "off"}
    now = {key: "off" if execution[key] is False else execution[key] for key in kinds}  # a bare off is false to YAML
    for fusion in fusions():
        for kind in ("off", "selective", "full"):
            if (kind, fusion) != (now["activation_checkpointing"], now["fusion"]):
                words = (f"execution.activation_checkpointing='{kind}'", f"execution.fusion='{fusion}'")
                yield Way(f"checkpointing {kind}, fusion {fusion}", words)
    for key, value in (("loss_chunk", 16), ("row_multiple", 64)):
        yield Way(f"{key}: {value}", (f"execution.{key}={value}",))
    if "vision_encoder" not in learning_modules(settings["model"]):
        yield Way("vision_chunk: 1", ("execution.vision_chunk=1",))
    for workers in (0, 2):
        if workers != loader["num_workers"]:
            yield Way(f"num_workers: {workers}", (f"train_loader.num_workers={workers}",))
    sharding = settings["trainer"]["parallelism_config"]
    fsdp = sharding and sharding["fsdp"]
    ddp, kept = ("trainer.parallelism_config=null",), (f"{FSDP}.reshard_after_forward=false",)
    if fsdp:
        yield Way("DDP", ddp)
    else:
        yield Way("FSDP2", (f"{FSDP}.version=2",))
    if fsdp and fsdp["version"] == 2 and fsdp["reshard_after_forward"]:
        yield Way("FSDP2, kept after the forward pass", kept)
    if ranks > 1:
        yield Way(f"{ranks} ranks, as given", ranks=ranks)
        yield (
            Way(f"{ranks} ranks, DDP", ddp, ranks=ranks)
            if fsdp
            else Way(f"{ranks} ranks, FSDP2", (f"{FSDP}.version=2",), ranks=ranks)
        )
        if ranks % 2 == 0 and ranks > 2:
            replicas = (f"{FSDP}.version=2", f"{FSDP}.data_parallel_replicate_degree=2")
            yield Way(f"{ranks} ranks, 2 replicas (HSDP)", replicas, ranks=ranks)


def fusions() -> list[str]:
    """Kinds of fusion that this machine computes in seconds."""
    kinds = ["off"]
    if torch.cuda.is_available():
        kinds += ["compile", *(["liger"] if importlib.util.find_spec("liger_kernel") else [])]
    return kinds


def measure(yaml: str, words: Sequence[str], ranks: int, tell: Callable[[str], None]) -> tuple[list[Row], torch.dtype]:
    """Compute a step in all ways; returns a row for each, and what products are computed in.

    Args:
        yaml: Of the run.
        words: Overrides.
        ranks: How many a step is also shared by; each needs a device of its own. 1 stays in this process.
        tell: Called with each way's name when its turn has come.

    Raises:
        ValueError: The YAML's own step can't be computed, or the ranks don't divide the batch.
    """
    settings = plain(load_config(yaml, words))
    batch = settings["train_loader"]["global_batch_size"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--invariance: starts ranks itself; leave the launcher out, and give --ranks")
    if batch % ranks:
        raise ValueError(f"--ranks: found {ranks}, which doesn't divide global_batch_size {batch}; take a divisor")
    trainer = settings["trainer"]
    if (parallelism := trainer["parallelism_config"]) and parallelism["fsdp"]:  # replicas are for more ranks
        words = [*words, f"{FSDP}.data_parallel_replicate_degree=null", f"{FSDP}.data_parallel_shard_degree=-1"]
    comparison = Comparison(yaml, words, compute_dtype(trainer["precision"], trainer["parallelism_config"]))
    rows = []
    for way in ways_of(settings, ranks):
        tell(way.what)
        if settings["train_loader"]["loss_average"] == "rank" and way.ranks > 1:
            rows.append(Row(way, why="left out: loss_average rank depends on the ranks, as the reference does"))
        else:
            rows.append(comparison.row_of(way))
    return rows, comparison.dtype


class Comparison:
    """Ways of a YAML's step beside its own.

    Args:
        yaml: Of the run.
        words: Overrides.
        dtype: What its products are computed in.
    """

    def __init__(self, yaml: str, words: Sequence[str], dtype: torch.dtype) -> None:
        self.yaml, self.words, self.dtype = yaml, words, dtype
        self.own: dict[bool, Step] = {}  # by whether it is in fp64

    def row_of(self, way: Way) -> Row:
        """A way's row; a way that this model or machine doesn't know has none, and says why."""
        own = self._own()
        if not way.words and not way.one_sample and way.ranks == 1:
            return Row(way, own)
        try:
            step = self._step(way)
            if step.samples != own.samples:
                return Row(way, step, {"samples": math.inf}, why="found other samples than the YAML's step")
            row = Row(way, step, _differences(step, own))
            if self.dtype == torch.float32 and row.worst > LIMITS[self.dtype]:
                row = replace(row, in_fp64=_differences(self._step(way, fp64=True), self._own(fp64=True)))
            return row
        except ValueError as error:
            return Row(way, why=f"left out: {' '.join(str(error).split())}")

    def _own(self, fp64: bool = False) -> Step:
        if fp64 not in self.own:
            self.own[fp64] = self._step(Way("as given"), fp64)
        return self.own[fp64]

    def _step(self, way: Way, fp64: bool = False) -> Step:
        words = [*self.words, *way.words]
        try:
            if way.ranks > 1:
                return step_of_ranks(self.yaml, words, way.ranks, fp64)
            return step_here(self.yaml, words, way.one_sample, fp64)
        finally:
            gc.collect()


def _differences(step: Step, own: Step) -> dict[str, float]:
    """Of the loss and of each module's gradients, relative; NaN where a gradient is missing."""
    whole, apart = own.norms(), step.norms(own)
    found = {"loss": abs(step.loss - own.loss) / abs(own.loss)}
    for module, norm in whole.items():
        missing = any(name.startswith(f"{module}.") and name not in step.gradients for name in own.gradients)
        by = math.nan if missing else apart.get(module, math.nan)
        found[module] = by / norm if norm else by and math.inf
    return found


def table(rows: Sequence[Row], dtype: torch.dtype) -> tuple[str, bool]:
    """The rows in words, with the worst of them, and whether none is beyond the limit."""
    own, limit = rows[0].step, LIMITS[dtype]
    assert own is not None
    bits = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    columns, again = ["loss", *own.norms()], "  the same in fp64"
    norms = ", ".join(f"{module} {norm:.4g}" for module, norm in own.norms().items())
    width = max(len(text) for text in (again, *(row.way.what for row in rows)))

    def line(what: str, counts: Sequence[object], differences: Mapping[str, float]) -> str:
        cells = [f"{count:>13}" for count in counts]
        cells += [f"{differences[column]:14.1e}" if column in differences else "" for column in columns]
        return "  ".join([f"  {what:{width}}", *cells]).rstrip()

    lines = [f"a step of {len(own.samples)} samples in {bits}: loss {own.loss:.6g}, norm of gradients: {norms}"]
    heads = [f"{word:>13}" for word in ("microbatches", "without image")] + [f"{column:>14}" for column in columns]
    lines.append("  ".join([f"  {'relative difference':{width}}", *heads]))
    for row in rows:
        if row.step is None or row.why:
            lines.append(f"  {row.way.what:{width}}  {row.why}")
            continue
        lines.append(line(row.way.what, (row.step.microbatches, row.step.without_image), row.differences))
        if row.in_fp64:
            lines.append(line(again, ("", ""), row.in_fp64))
    worst = max(rows, key=lambda row: row.worst)
    rounded = max((largest(row.differences) for row in rows if row.in_fp64), default=0.0)
    said = f"worst: {worst.worst:.1e} ({worst.way.what}), {'within' if worst.worst <= limit else 'beyond'} {limit:.0e}"
    said += f"; {rounded:.1e} in fp32 where fp64 tells rounding from a fault" if rounded else ""
    left_out = sum(row.step is None for row in rows)
    lines.append(said + (f"; {left_out} of {len(rows)} ways left out" if left_out else ""))
    if dtype == torch.bfloat16:
        fix = f"trainer.precision=fp32 {FSDP}.mixed_precision=FULL"
        lines.append(f"the limit is that of bf16, which rounds; {fix} compares to {LIMITS[torch.float32]:.0e}")
    return "\n".join(lines), worst.worst <= limit
