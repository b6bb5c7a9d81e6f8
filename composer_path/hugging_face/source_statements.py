"""A module's source as its top-level statements: what each binds, what it uses, and how it reads elsewhere.

Of imports under `if TYPE_CHECKING` only the other branch counts.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

_HERE = Path(__file__).parents[2]  # where the package lies
Importing = ast.Import | ast.ImportFrom
# What an import within a function or a `try` becomes, and whether it stands in a `try`.
Rewrite = Callable[[Importing, bool], str]


@dataclass(frozen=True)
class Statement:
    """A statement at a module's top, with the comments above it.

    Attributes:
        node: Its tree.
        lines: Of the whole module.
        indent: What its lines begin with, where it comes out of a branch.
    """

    node: ast.stmt
    lines: list[str]
    indent: int = 0

    @property
    def binds(self) -> set[str]:
        """Names that it gives a value, or adds to one's."""
        node = self.node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return {node.name}
        if isinstance(node, Importing):
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if isinstance(node, ast.Try | ast.If):
            parts = [Statement(one, self.lines) for one in ast.iter_child_nodes(node) if isinstance(one, ast.stmt)]
            return set().union(*(part.binds for part in parts))
        return set()  # what only acts, and is nobody's

    @cached_property
    def uses(self) -> set[str]:
        """Names that it reads, annotations included."""
        return {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}

    @cached_property
    def attributes(self) -> set[tuple[str, str]]:
        """Names with what is read of them, such as ("png", "SIGNATURE")."""
        found = (node for node in ast.walk(self.node) if isinstance(node, ast.Attribute))
        return {(node.value.id, node.attr) for node in found if isinstance(node.value, ast.Name)}

    def imports_inside(self) -> Iterator[tuple[Importing, bool]]:
        """Imports within it, and whether each stands in a `try`."""
        return () if isinstance(self.node, Importing) else _imports(self.node, isinstance(self.node, ast.Try))  # type: ignore[return-value]

    @property
    def first_line(self) -> int:
        """Where its decorators begin, counted from 0."""
        decorators = getattr(self.node, "decorator_list", [])
        return min(one.lineno for one in (self.node, *decorators)) - 1

    @property
    def first_comment(self) -> int:
        """Where the comments above it begin, counted from 0."""
        start = self.first_line
        while start and self.lines[start - 1].startswith("#"):
            start -= 1
        return start

    @property
    def space_above(self) -> str:
        """The blank lines above it and its comments."""
        above = (line.strip() for line in reversed(self.lines[: self.first_comment]))
        return "\n" * sum(1 for _ in takewhile(lambda line: not line, above))

    def text(self, rewrite: Rewrite) -> str:
        """As it is written, with the imports within it rewritten."""
        assert self.node.end_lineno is not None
        lines: list[str | None] = list(self.lines[: self.node.end_lineno])
        for node, in_try in self.imports_inside():
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
            lines[node.lineno - 1] = textwrap.indent(rewrite(node, in_try), " " * node.col_offset)
        return "\n".join(line[self.indent :] for line in lines[self.first_comment :] if line is not None)


def _imports(node: ast.AST, in_try: bool) -> Iterator[tuple[Importing, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Importing):
            yield child, in_try
        else:
            yield from _imports(child, in_try or isinstance(child, ast.Try))


def file_of_module(name: str) -> Path | None:
    """The file of a module of this package; None where there is none of that name."""
    file = _HERE.joinpath(*name.split(".")).with_suffix(".py")
    return file if file.is_file() else None


class ModuleSource:
    """A module that isn't executed, only read.

    Args:
        name: As it is imported.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        file = file_of_module(name)
        assert file is not None
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.summary = ast.get_docstring(tree, clean=False)
        lines = text.splitlines()
        self.statements = [
            statement
            for node in tree.body
            for statement in _taken(node, lines)
            if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        ]

    def binding(self, name: str) -> list[Statement]:
        """The statements that make a name what it is."""
        return [statement for statement in self.statements if name in statement.binds]


def _taken(node: ast.stmt, lines: list[str]) -> list[Statement]:
    """A statement, or those of the branch that runs."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return [Statement(one, lines, one.col_offset) for one in node.orelse]
    return [Statement(node, lines)]
