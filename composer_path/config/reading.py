"""The YAML's way in: load, merge overrides, check everything, and list all mistakes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse
from yaml import YAMLError

from composer_path.config.agreement import disagreements
from composer_path.config.check import UNREADABLE, check_keys, join
from composer_path.config.schema import ABSENT, Choice, Key, Section
from composer_path.config.sections import config_schema

# An environment variable is read only where the YAML names it; oc.decode makes a number of its text.
RESOLVERS = {"oc.env", "oc.decode"}
ANYTHING = Key()


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
    """A YAML with overrides, complete, and checked before anything is built.

    Args:
        path: The YAML.
        overrides: `key=value` with dots between the levels; the value is read as YAML. A mapping is merged into what
            is there; `null` empties a key.

    Returns:
        The configuration with every key that a section may hold: what the YAML leaves out has the default of the
        signature that gets it. Interpolations stay as they stand (they are filled in when a value is read), so that it
        can be written beside the results without the values of environment variables.

    Raises:
        ConfigError: Lists every problem.
    """
    problems: list[str] = []
    config = _read(path, overrides, problems)
    given = OmegaConf.to_container(config, resolve=False)
    assert isinstance(given, dict)
    _complete(config, config_schema(), "", problems)
    known = check_keys(_resolve(config, "", problems), problems)
    problems += disagreements(known, {str(key): value for key, value in given.items()})
    if problems:
        raise ConfigError(path, problems)
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain mappings and lists, with interpolations filled in."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _complete(config: DictConfig, section: Section, path: str, problems: list[str]) -> None:
    """Fill in what a section, and those in it, leave out."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    for key, node in section.keys.items():
        if isinstance(node, Key):
            if key not in raw and not node.required and node.default is not ABSENT:
                config[key] = node.default
        elif raw.get(key) is None and not node.required and (key in raw or node.left_out != "absent"):
            config[key] = None if node.left_out == "null" else {}
    for name in map(str, config):
        node, where = section.keys.get(name, section.members or ANYTHING), join(path, name)
        if isinstance(node, Key):
            continue
        try:
            child = config[name]
            part = _chosen(child, node) if isinstance(node, Choice) else node
        except OmegaConfBaseException:
            continue  # said when it is resolved
        if (
            OmegaConf.is_interpolation(config, name)
            and isinstance(child, Mapping)
            and any(_resolvers(parse(raw[name])))
        ):
            problems.append(f"{where}: found {raw[name]}; a section is written out, or another section's: ${{name}}")
        if not isinstance(child, DictConfig) or part is None:
            continue
        _complete(child, part, where, problems)


def _chosen(config: Any, choice: Choice) -> Section | None:
    """The section that a choice's selector names; None where it names none."""
    if not isinstance(config, DictConfig):
        return None
    if config.get(choice.selector) is None and choice.default is not None:
        config[choice.selector] = choice.default
    return {str(name): section for name, section in choice.sections.items()}.get(str(config.get(choice.selector)))


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
        if text and set(_resolvers(parse(text))) - RESOLVERS:
            problems.append(f"{where}: found {text}; filled in are ${{other.key}} and ${{oc.env:NAME}} only")
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{where}: found {text}, which can't be filled in: {_reason(error)}")
            continue
        plain[key] = _resolve(value, where, problems)
    return list(plain.values()) if is_list else plain


def _resolvers(tree: Any) -> Iterator[str]:
    """The names before a colon in a parsed interpolation, nested ones too; a computed name as it is written."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        yield tree.resolverName().getText()
    for child in getattr(tree, "children", None) or ():
        yield from _resolvers(child)


def _reason(error: Exception) -> str:
    """OmegaConf's own words without the name of its exception."""
    return str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
