"""What loggers are told of a run's settings: all of them, without the values of environment variables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from composer.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from composer_path.run.names import snake_name

log = logging.getLogger(__name__)
AT_ONCE = 100  # mlflow takes no more


def tell_settings(logger: Logger, config: DictConfig) -> None:
    """Give each logger the settings as hyperparameters, `trainer.max_duration` and so on.

    One that refuses them, as mlflow does where a resumed run has others, is named and goes on.
    """
    told = list(settings_told(config).items())
    for destination in logger.destinations:
        try:
            for start in range(0, len(told), AT_ONCE):
                destination.log_hyperparameters(dict(told[start : start + AT_ONCE]))
        except Exception as error:  # of whatever service it writes to: a run doesn't end by it
            name = snake_name(type(destination).__name__).removesuffix("_logger")
            log.warning("loggers.%s: took not all settings (%s); config.yaml has them", name, type(error).__name__)


def settings_told(config: DictConfig) -> dict[str, Any]:
    """All settings by their paths, filled in; what comes from an environment variable is told by its name."""
    hidden = OmegaConf.create(_hidden(OmegaConf.to_container(config, resolve=False)))
    return dict(_flat(OmegaConf.to_container(hidden, resolve=True)))


def _hidden(value: Any) -> Any:
    """The same, with names in place of environment variables wherever they are read."""
    if isinstance(value, dict):
        return {key: _hidden(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_hidden(member) for member in value]
    reads = isinstance(value, str) and "oc.env" in value
    return value.replace("${", "$(").replace("}", ")") if reads else value


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            yield from _flat(member, f"{path}.{key}" if path else str(key))
    elif value not in ({}, []):
        yield path, value
