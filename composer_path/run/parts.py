"""What the YAML's named sections become: Composer's algorithms, callbacks and loggers, and ours."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from composer_path.callbacks.step_line import StepLine
from composer_path.own_parts.registry import own_classes
from composer_path.run.names import named_classes


def build_parts(section: str, named: Mapping[str, Any], of_the_run: Mapping[str, Any]) -> list[Any]:
    """The objects of `algorithms`, `callbacks` or `loggers`, from `snake_name: {keywords}`.

    Classes with `is_run_object` get their keyword-only arguments `of_the_run`. TensorBoard writes into the run's folder
    unless the YAML says otherwise. Where no progress bar can be drawn, the console gets a line a step.
    """
    parts = []
    for name, keywords in named.items():
        cls = named_classes(section)[name]
        own = dict(keywords or {})
        if getattr(cls, "is_run_object", False):
            parameters = inspect.signature(cls).parameters.values()
            own |= {p.name: of_the_run[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
        if name == "tensorboard" and own.get("log_dir") is None:
            own["log_dir"] = str(of_the_run["run_folder"] / "runs")
        parts.append(cls(**own))
    if section == "loggers" and not sys.stderr.isatty():
        parts.append(StepLine())
    return parts


def build_metrics(named: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one's own, from `snake_name: {keywords}`."""
    return {name: own_classes("metrics")[name](**(keywords or {})) for name, keywords in named.items()}


def trainer_keywords(section: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for Composer's Trainer: the YAML's, less what is built of it, or our own saver and loader get."""
    ours = {"parallelism_config", "autoresume", "best", *(key for key in section if key.startswith(("save_", "load_")))}
    keywords = {key: value for key, value in section.items() if key not in ours - {"save_metrics"}}
    if keywords["progress_bar"] is None:
        keywords["progress_bar"] = sys.stderr.isatty()
    return keywords
