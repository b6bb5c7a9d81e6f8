"""What finished runs left, as a table: held-out losses, speed, closed questions, and where everything lies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"  # in a run's folder, written at its start
SUMMARY = "summary.json"  # in a run's folder, written at its end
EVALUATION = "evaluation.json"  # in a model folder, written by `composer-path evaluate`

# What lies in a run's folder, in the order of the listing.
PLACES = dict(checkpoints="checkpoints", projector="projector.safetensors", model="model", TensorBoard="runs")


def format_runs(root: Path) -> str:
    """A table of all runs below a folder, the closed questions asked of its models, and where everything lies.

    Raises:
        ValueError: There is no finished run.
    """
    runs = read_summaries(root)
    models = sorted(path.parent for path in [*root.glob(f"*/{EVALUATION}"), *root.glob(f"*/model/{EVALUATION}")])
    exported = [path.parent for path in sorted(root.glob("*/processor_config.json"))]
    parts = [_table_of_losses([summary for _, summary in runs])]
    parts += [f"{format_closed(_read(model / EVALUATION))}\n(asked of {model})" for model in models]
    places = [(summary["run"], name, folder / what) for folder, summary in runs for name, what in PLACES.items()]
    places += [("exported", "model", folder) for folder in exported]
    found = [(run, name, str(place)) for run, name, place in places if place.exists()]
    parts.append("\n".join(_in_columns(found)))
    return "\n\n".join(parts)


def read_summaries(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and summary of each run below a folder, in the order in which they ended.

    Raises:
        ValueError: There is none.
    """
    paths = sorted(root.glob(f"*/{SUMMARY}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(f"no {SUMMARY} in a folder below '{root}'; give the save_root of finished runs")
    return [(path.parent, _read(path)) for path in paths]


def format_closed(comparison: Mapping[str, Any]) -> str:
    """A table of what `compare_with_blank` found: a row a kind of closed questions, then all of them."""
    rows = [("closed questions", "asked", "majority", "with image", "blank image", "no option named")]
    for kind, numbers in [*comparison["kinds"].items(), ("all", comparison["all"])]:
        asked, seen, blank = numbers["asked"], numbers["with_image"], numbers["blank_image"]
        shares = [numbers["majority"], *(result["correct"] / max(1, asked) for result in (seen, blank))]
        unparsed = f"{seen['unparsed']}, blank {blank['unparsed']}"
        rows.append((kind, str(asked), *(f"{share:.0%}" for share in shares), unparsed))
    return "\n".join(_in_columns(rows, numbers_from=1))


def _table_of_losses(summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = [("run", "steps", "held-out loss before", "after", "samples/s", "tokens/s")]
    for summary in summaries:
        loss = summary["heldout_token_loss"]
        losses = [f"{loss[moment]:.3f}" if moment in loss else "-" for moment in ("before", "after")]
        speeds = f"{summary['samples_per_second']:.1f}", f"{summary['tokens_per_second']:.0f}"
        rows.append((summary["run"], str(summary["steps"]), *losses, *speeds))
    return "\n".join(_in_columns(rows, numbers_from=1))


def _in_columns(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> list[str]:
    """Lines with aligned columns; those from `numbers_from` on are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if numbers_from is not None and column >= numbers_from else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
