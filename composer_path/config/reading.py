"""The YAML's way in: load, merge overrides, check everything, and list all mistakes together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_path.config.check import UNREADABLE, check_config, join

# An environment variable is read only where the YAML names it; oc.decode makes a number of its text.
RESOLVERS = {"oc.env", "oc.decode"}
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")


class ConfigError(ValueError):
    """All mistakes of a YAML and its overrides, one a line: where, what was found, what to do.

    Args:
        source: The YAML's path.
        problems: The lines.
    """

    def __init__(self, source: str | Path, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{source}: {count}", *problems]))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """A YAML with overrides, checked before anything is built.

    Args:
        path: The YAML.
        overrides: `key=value` with dots between the levels; the value is read as YAML. A mapping is merged into what
            is there; `null` empties a key.

    Returns:
        The configuration with its interpolations as they stand (they are filled in when a value is read), so that it
        can be written beside the results without the values of environment variables. `variables`, `execution`,
        `algorithms`, `callbacks` and `loggers` are always mappings, and `eval_loader` is None where it isn't given.

    Raises:
        ConfigError: Lists every problem.
    """
    problems: list[str] = []
    config = _read(path, overrides, problems)
    check_config(_resolve(config, "", problems), problems)
    if problems:
        raise ConfigError(path, problems)
    for section in ("variables", "execution", "algorithms", "callbacks", "loggers"):
        if config.get(section) is None:
            config[section] = {}
    config.setdefault("eval_loader", None)
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists, its interpolations filled in."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _read(path: str | Path, overrides: Iterable[str], problems: list[str]) -> DictConfig:
    """The YAML as it stands, with the overrides merged in."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(path, ["there is no such file"]) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(path, [f"can't be read as YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(path, ["must be a mapping of sections, found a list"])
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"override '{override}': it must be key=value, as in trainer.max_duration=2ep")
            continue
        try:
            config.merge_with_dotlist([override])
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"override '{override}': can't be applied: {str(error).splitlines()[0]}")
    return config


def _resolve(node: Any, path: str, problems: list[str]) -> Any:
    """Plain values instead of interpolations; those that fail and those left at ??? are reported."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    raw: Any = OmegaConf.to_container(node, resolve=False)
    plain: dict[Any, Any] = {}
    for key in range(len(node)) if is_list else list(node):
        where = f"{path}[{key}]" if is_list else join(path, key)
        plain[key] = UNREADABLE
        if OmegaConf.is_missing(node, key):
            problems.append(f"{where}: found ???; give a value, here or as the override {where}=...")
            continue
        text = str(raw[key]) if OmegaConf.is_interpolation(node, key) else ""
        if set(RESOLVER.findall(text)) - RESOLVERS:
            problems.append(f"{where}: found {text}; filled in are ${{other.key}} and ${{oc.env:NAME}} only")
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{where}: found {text}, which can't be filled in: {_reason(error)}")
            continue
        plain[key] = _resolve(value, where, problems)
    return list(plain.values()) if is_list else plain


def _reason(error: Exception) -> str:
    """OmegaConf's own words without the name of its exception."""
    return str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
