"""What stands in a YAML as `${…}`: filled in from other keys and named environment variables only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from composer_path.config.plain_yaml import MAX_DEPTH
from composer_path.config.schema import join

# An environment variable is read only where the YAML names it; oc.decode makes a number of its text.
RESOLVERS = {"oc.env", "oc.decode"}
UNREADABLE = object()  # stands where a value can't be filled in, which is reported


def fill_in(node: Any, problems: list[str], path: str = "", depth: int = 0) -> Any:
    """Plain values in place of a configuration's interpolations; those that fail, and a left ???, are reported."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    written: Any = OmegaConf.to_container(node, resolve=False)
    values: dict[Any, Any] = {}
    for key in range(len(node)) if is_list else node:
        where = f"{path}[{key}]" if is_list else join(path, key)
        text = str(written[key]) if OmegaConf.is_interpolation(node, key) else ""
        values[key] = UNREADABLE
        if OmegaConf.is_missing(node, key):
            problems.append(f"{where}: found ???; give a value, here or as the override {where}=...")
        elif text and not RESOLVERS.issuperset(_resolvers(parse(text))):
            problems.append(f"{where}: found {text}; filled in are ${{other.key}} and ${{oc.env:NAME}} only")
        elif depth > MAX_DEPTH:
            problems.append(f"{where}: is nested more than {MAX_DEPTH} levels deep; a section that stands in itself?")
        else:
            try:
                values[key] = fill_in(node[key], problems, where, depth + 1)
            except OmegaConfBaseException as error:
                why = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
                problems.append(f"{where}: found {text}, which can't be filled in: " + why.strip('"'))
    if not is_list:
        return values
    return UNREADABLE if UNREADABLE in values.values() else list(values.values())


def _resolvers(tree: Any) -> Iterator[str]:
    """The names before a colon in a parsed interpolation, nested ones too; a computed name as it is written."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        yield tree.resolverName().getText()
    for child in getattr(tree, "children", None) or ():
        yield from _resolvers(child)
