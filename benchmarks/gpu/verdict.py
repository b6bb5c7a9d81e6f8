"""What results are worth: first whether a variant computed the same, only then how fast it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.jobs import Results
from benchmarks.gpu.variants import BASELINE, OURS, VARIANTS
from benchmarks.measure import print_table

# Of the first step against the eager variant's, relative. Products are in bf16 everywhere, and their sums in another
# order; gradients of keys are what is left of differences. The cells compare in fp32, and closely.
LOSS, NORM, GRADIENT = 5e-3, 5e-2, 0.25
GOAL_MFU, LEAST_MFU = 0.6, 0.5
GOAL_OVER_PADDED = {"1": 1.8, "2": 3.0}
GOAL_OVER_TRANSFORMERS = 1.15
NEEDS_CUDA = "needs a CUDA device"


def job_name(stage: str, variant: str) -> str:
    """Of a training run."""
    return f"stage {stage}: {variant}"


def errors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Relative errors of the first loss, of the norm of all gradients, and the largest of a watched gradient."""
    ours, theirs = found["gradients"], expected["gradients"]
    missing = theirs["of"].keys() ^ ours["of"].keys()
    watched = [
        math.dist(ours["of"][name]["entries"], theirs["of"][name]["entries"]) / (math.hypot(*entries) or 1e-30)
        for name in theirs["of"].keys() & ours["of"].keys()
        for entries in [theirs["of"][name]["entries"]]
    ]
    return {
        "loss": abs(found["losses"][0] / expected["losses"][0] - 1),
        "gradient_norm": abs(ours["norm"] / theirs["norm"] - 1),
        "gradients": math.nan if missing or not watched else max(watched, key=lambda error: (error != error, error)),
    }


def judge(results: Results, stage: str) -> None:
    """Write into each run of a stage its errors, `unequal` where they are too large, and its rates where not."""
    expected = results.jobs.get(job_name(stage, BASELINE), {})
    peak = results.about.get("peak")
    product = results.jobs.get("ceilings", {}).get("matmul_tflops")
    for variant in VARIANTS:
        found = results.jobs.get(job_name(stage, variant), {})
        for key in ("unequal", "errors", "mfu", "share_of_product", "over_padded", "over_transformers"):
            found.pop(key, None)
        if "losses" not in found or "failed" in found:
            continue
        if "losses" not in expected or "failed" in expected:
            found["unequal"] = f"nothing to compare with: {BASELINE} failed"
            continue
        found["errors"] = errors(found, expected)
        limits = {"loss": LOSS, "gradient_norm": NORM, "gradients": GRADIENT}
        wrong = [f"{key} {found['errors'][key]:.1e} (at most {most:g})" for key, most in limits.items()]
        wrong = [words for words, key in zip(wrong, limits, strict=True) if not found["errors"][key] <= limits[key]]
        if wrong or not all(map(math.isfinite, found["losses"])):
            found["unequal"] = "differs from eager: " + ", ".join(wrong or ["a loss is not finite"])
            continue
        found["mfu"] = found["needed_tflops"] * 1e12 / peak if peak else None
        found["share_of_product"] = found["needed_tflops"] / product if product else None
    for variant in VARIANTS:
        found = results.jobs.get(job_name(stage, variant), {})
        for other in ("padded", "transformers"):
            rate = rate_of(results.jobs.get(job_name(stage, other), {}))
            if rate and (own := rate_of(found)):
                found[f"over_{other}"] = own / rate


def rate_of(report: Mapping[str, Any]) -> float | None:
    """Samples a second of a run that computed the same, or None."""
    return None if {"failed", "unequal", "not_run"} & report.keys() else report.get("samples_per_s")


def problems(results: Results, names: Sequence[str]) -> dict[str, str]:
    """Why the exit code isn't 0, by job: everything that was asked for and isn't there, or is wrong.

    What a CPU can't run is no problem of a tiny call; it isn't a success either.
    """
    found = {}
    for name in names:
        report = results.jobs.get(name, {"failed": "not begun"})
        why = next((report[key] for key in ("failed", "unequal", "not_run") if key in report), None)
        if why is not None and not (results.about["tiny"] and report.get("not_run") == NEEDS_CUDA):
            found[name] = why
    return found


def goals(results: Results) -> list[str]:
    """A line for each goal: what was found, or that it is open."""
    lines = []
    for stage, over_padded in GOAL_OVER_PADDED.items():
        ours = [results.jobs.get(job_name(stage, variant), {}) for variant in OURS]
        for key, goal, words in (
            ("mfu", GOAL_MFU, f"share of the peak in needed operations (floor {LEAST_MFU})"),
            ("over_padded", over_padded, "times the reference-like run"),
            ("over_transformers", GOAL_OVER_TRANSFORMERS, "times transformers with Liger"),
        ):
            best = max((value for report in ours if (value := report.get(key)) is not None), default=None)
            if results.about["gpu"] is None:
                best = None
            state = "open, not measured" if best is None else f"{best:.2f}, {'met' if best >= goal else 'missed'}"
            lines.append(f"stage {stage}: {goal} {words}: {state}")
    return lines


def show(results: Results, stages: Sequence[str]) -> None:
    """Tables of the stages, everything else by name, and the goals."""
    for stage in stages:
        rows = []
        for variant in VARIANTS:
            report = results.jobs.get(job_name(stage, variant))
            if report is None:
                continue
            why = next((f"{key}: {report[key]}" for key in ("failed", "unequal", "not_run") if key in report), None)
            if why is not None:
                rows.append([variant, why[:100].replace("not_run", "not run here"), "", "", "", "", ""])
                continue
            cells = [report.get("samples_per_s"), report.get("mfu"), report.get("over_padded")]
            peak = report["peak_bytes"] / 1e9 if report["peak_bytes"] else None
            cells += [report.get("over_transformers"), peak, report.get("memory_over_plan")]
            rows.append([variant, *("" if cell is None else cell for cell in cells)])
        header = [f"stage {stage}", "samples/s", "MFU", "over padded", "over transformers", "peak GB", "over plan"]
        print_table(header, rows)
    for name, report in results.jobs.items():
        if not name.startswith("stage "):
            print(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in report.items()))
    print("\n".join(goals(results)))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        error = value.get("gradient_error")
        return f"{error:.1e}" if error is not None else str({key: _short(one) for key, one in value.items()})
    return f"{value:.4g}" if isinstance(value, float) else str(value)
