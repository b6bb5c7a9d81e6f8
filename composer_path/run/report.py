"""What a run came to: its configuration and a small `summary.json` in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from omegaconf import DictConfig, OmegaConf

from composer_path.asking.run_table import CONFIG, SUMMARY
from composer_path.guards.guards import Guards
from composer_path.run.evaluations import HELD_OUT
from composer_path.run.names import snake_name
from composer_path.run.place import address_of
from composer_path.storage.atomic import write_whole
from composer_path.storage.places import is_remote
from composer_path.weights.folder import write_json


class RunReport(Callback):
    """Writes `config.yaml` and `summary.json` into the run's folder."""

    def __init__(self, run_folder: Path, parameters: dict[str, int]) -> None:
        self.run_folder, self.ended = run_folder, False
        self.summary: dict[str, Any] = {"parameters": parameters, "heldout_token_loss": {}}

    def save_config(self, config: DictConfig, history: Sequence[Mapping[str, Any]]) -> None:
        """Keep the configuration as given: it may name environment variables, but never holds their values.

        What changed at a resume stands above it, in comments. An older summary goes: it is of other steps.
        """
        if dist.get_global_rank() == 0:
            lines = [f"# from step {entry['step']} on: {line}" for entry in history for line in entry["changes"]]
            text = "".join(f"{line}\n" for line in lines) + OmegaConf.to_yaml(config)
            write_whole(self.run_folder / CONFIG, lambda file: file.write(text.encode()))
            (self.run_folder / SUMMARY).unlink(missing_ok=True)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the held-out loss: the first and the newest."""
        moment = "before" if state.timestamp.batch == 0 else "after"
        now = state.dataloader_label  # a standalone evaluation's last event comes after all of its sets
        for label in (now,) if now in state.eval_metrics else state.eval_metrics:
            loss = state.eval_metrics[label]["token_loss"].compute().item()
            if label == HELD_OUT:
                self.summary["heldout_token_loss"][moment] = loss
            else:
                self.summary.setdefault("eval_token_loss", {}).setdefault(label, {})[moment] = loss
        if self.ended:  # Composer's last evaluation comes after the end of `fit`
            self._write()

    eval_standalone_end = eval_end  # of an evaluation outside of training

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the summary."""
        now, seconds = state.timestamp, state.timestamp.total_wct.total_seconds()
        self.summary |= {"run": state.run_name, "steps": now.batch.value, "seconds": seconds}
        for name, count in (("samples", now.sample.value), ("tokens", now.token.value)):
            self.summary |= {name: count, f"{name}_per_second": count / max(seconds, 1e-9)}
        self.summary["skipped_steps"] = sum(one.skipped for one in state.callbacks if isinstance(one, Guards))
        self.ended = True
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The first held-out loss survives a resume. Its key is always there, as sharded checkpoints need."""
        return {"heldout_token_loss_before": self.summary["heldout_token_loss"].get("before")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        if state["heldout_token_loss_before"] is not None:
            self.summary["heldout_token_loss"]["before"] = state["heldout_token_loss_before"]

    def _write(self) -> None:
        if dist.get_global_rank() == 0:
            write_json(self.run_folder / SUMMARY, self.summary)


def nothing_left(settings: Mapping[str, Any], run_folder: Path) -> str:
    """What to say of a run whose last step was done before this start, complete or stopped there."""
    root, name = settings["save_root"], settings["trainer"]["run_name"]
    place = address_of(root, name)
    if is_remote(root) or (run_folder / SUMMARY).is_file():
        return f"this run has ended before; its results lie in {place} (trainer.max_duration says how long)"
    return (
        "this run has no step left (trainer.max_duration says how long), and was stopped before its results were "
        f"written; composer-path export {place} FOLDER writes a model of its newest checkpoint"
    )


def require_steps(state: State) -> None:
    """Refuse a callback that ended the run by the evaluation before training; ValueError."""
    if state.max_duration is not None and state.timestamp >= state.max_duration:
        stoppers = [one for one in state.callbacks if isinstance(one, EarlyStopper | ThresholdStopper)]
        names = " and ".join(f"callbacks.{snake_name(type(one).__name__)}" for one in stoppers) or "a callback"
        raise ValueError(
            f"{names}: must let the run have steps; found that the evaluation before training met it, so nothing would "
            "be trained; choose another threshold"
        )
