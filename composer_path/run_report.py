"""What a run came to: its configuration and a small `summary.json` in its folder, and a table over several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from omegaconf import DictConfig, OmegaConf

from composer_path.weights.folder import write_json

SUMMARY = "summary.json"
CONFIG = "config.yaml"


class RunReport(Callback):
    """Writes `config.yaml` and `summary.json` into the run's folder.

    Args:
        run_folder: Where to.
        parameters: Numbers of trained and frozen ones.
    """

    def __init__(self, run_folder: Path, parameters: dict[str, int]) -> None:
        self.run_folder = run_folder
        self.summary: dict[str, Any] = {"parameters": parameters, "heldout_token_loss": {}}

    def save_config(self, config: DictConfig) -> None:
        """Keep the configuration as given, interpolations unresolved: it may name environment variables, not their values."""
        if dist.get_global_rank() == 0:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(config, self.run_folder / CONFIG)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the held-out loss: the first and the newest."""
        value = state.eval_metrics["heldout"]["token_loss"].compute().item()
        moment = "before" if state.timestamp.batch == 0 else "after"
        self.summary["heldout_token_loss"][moment] = value

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """The same for an evaluation outside of training."""
        self.eval_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the summary."""
        seconds = state.timestamp.total_wct.total_seconds()
        self.summary |= {
            "run": state.run_name,
            "steps": state.timestamp.batch.value,
            "samples": state.timestamp.sample.value,
            "tokens": state.timestamp.token.value,
            "seconds": seconds,
            "samples_per_second": state.timestamp.sample.value / max(seconds, 1e-9),
            "tokens_per_second": state.timestamp.token.value / max(seconds, 1e-9),
        }
        if dist.get_global_rank() == 0:
            write_json(self.run_folder / SUMMARY, self.summary)

    def state_dict(self) -> dict[str, Any]:
        """The first held-out loss survives a resume."""
        return {"heldout_token_loss": dict(self.summary["heldout_token_loss"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self.summary["heldout_token_loss"] = dict(state["heldout_token_loss"])


def read_summaries(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Summaries of all runs below a folder, pretraining first.

    Raises:
        ValueError: There is none.
    """
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(root.glob(f"*/{SUMMARY}"))]
    if not found:
        raise ValueError(f"no {SUMMARY} in a folder below '{root}'; give the save_root of finished runs")
    return sorted(found, key=lambda run: (run[0] / SUMMARY).stat().st_mtime)


def format_summaries(root: Path) -> str:
    """A table of held-out loss before and after, and speed, and where everything lies."""
    rows = [("run", "held-out loss before", "after", "samples/s", "tokens/s", "steps")]
    places = []
    for folder, summary in read_summaries(root):
        loss = summary["heldout_token_loss"]
        rows.append(
            (
                summary["run"],
                f"{loss['before']:.3f}" if "before" in loss else "-",
                f"{loss['after']:.3f}" if "after" in loss else "-",
                f"{summary['samples_per_second']:.1f}",
                f"{summary['tokens_per_second']:.0f}",
                str(summary["steps"]),
            )
        )
        places += [
            f"{what + ':':<13} {place}"
            for what, place in (
                ("weights", folder / "model"),
                ("weights", folder / "projector.safetensors"),
                ("checkpoints", folder / "checkpoints"),
                ("TensorBoard", folder / "runs"),
            )
            if place.exists()
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *places])
