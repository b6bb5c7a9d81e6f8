"""The YAML's way in: load, merge overrides, complete, check, and list all mistakes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_path.config.agreement import disagreements
from composer_path.config.check import check_keys
from composer_path.config.imported import import_named
from composer_path.config.interpolations import fill_in
from composer_path.config.model_path import expand_model_path
from composer_path.config.plain_yaml import check_plain
from composer_path.config.schema import complete
from composer_path.config.sections import config_schema
from composer_path.config.types import on_a_line

NO_YAML = (YAMLError, OmegaConfBaseException, ValueError)  # the last: no Unicode, a number of 5,000 digits


class ConfigError(ValueError):
    """All mistakes of a YAML and its overrides, one a line: where, what was found, what to do."""

    def __init__(self, source: str | Path, problems: Sequence[str]) -> None:
        self.problems = [on_a_line(problem) for problem in problems]
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{source}: {count}", *self.problems]))


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, allowed_imports: Sequence[str] | None = None
) -> DictConfig:
    """A YAML with overrides, complete, and checked before anything is built.

    Args:
        path: The YAML.
        overrides: `key=value` with dots between the levels; the value is read as YAML. A mapping is merged into what
            is there; `null` empties a key.
        allowed_imports: The modules and files of the YAML's `imports` that may be run, with their places; None for all
            that it names, beside what installed packages offer under names that it uses.

    Returns:
        The configuration with every key that a section may hold: what the YAML leaves out has the default of the
        signature that gets it. Interpolations stay as they stand (they are filled in when a value is read), so that it
        can be written beside the results without the values of environment variables.

    Raises:
        ConfigError: Lists every problem.
    """
    problems: list[str] = []
    config = _read(path, overrides, problems)
    problems += expand_model_path(config)
    given: Any = OmegaConf.to_container(config, resolve=False)
    if unfit := import_named(config, given, Path(path).resolve().parent, allowed_imports):
        raise ConfigError(path, unfit)
    problems += complete(config, config_schema())
    values = fill_in(config, problems)
    problems += check_keys(values, config_schema())
    problems += disagreements(values, given)
    if problems:
        raise ConfigError(path, problems)
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain mappings and lists, with interpolations filled in."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _read(path: str | Path, overrides: Iterable[str], problems: list[str]) -> DictConfig:
    """The YAML as it stands, with the overrides merged in."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_plain(text)
        config = OmegaConf.load(StringIO(text))
    except FileNotFoundError as error:
        raise ConfigError(path, ["there is no such file"]) from error
    except OSError as error:  # a folder, or no right to read it
        why = error.strerror or "it is a single value"  # the latter is OmegaConf's
        raise ConfigError(path, [f"can't be read: {why}"]) from error
    except NO_YAML as error:
        raise ConfigError(path, [f"can't be read as YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(path, ["must be a mapping of sections, found a list"])
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"override '{override}': it must be key=value, as in trainer.max_duration=2ep")
            continue
        try:
            check_plain(value)
            config.merge_with_dotlist([override])
        except (*NO_YAML, TypeError) as error:
            why = str(error).partition("\n")[0]
            problems.append(f"override '{override}': can't be applied: {why}")
    return config
