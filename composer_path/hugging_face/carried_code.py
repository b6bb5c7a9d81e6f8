"""The code that an exported folder carries for those who don't have this package: `export --self-contained`.

transformers copies a folder's Python files by their relative imports, `from .name import`, and knows no folders within
it. So each of our modules that its classes need is a file of the folder, with what is needed of it as it is written
here: its definitions and nothing that is only read by others. A statement that only acts, such as a registration, is
left out. Nobody of us loads it.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from composer_path import __version__
from composer_path.encoders.table import ENCODERS
from composer_path.hugging_face.source_statements import Importing, ModuleSource, Statement, file_of_module
from composer_path.weights.folder import write_json

PACKAGE = "composer_path"
ROOM = f"{PACKAGE}.hugging_face"
# What transformers is told of: file of the folder, key, module, class.
CLASSES = (
    ("config.json", "AutoConfig", f"{ROOM}.configuration", "ComposerPathConfig"),
    ("config.json", "AutoModelForImageTextToText", f"{ROOM}.modeling", "ComposerPathForConditionalGeneration"),
    ("processor_config.json", "AutoProcessor", f"{ROOM}.processor", "ComposerPathProcessor"),
    ("preprocessor_config.json", "AutoImageProcessor", f"{ROOM}.image_processor", "ComposerPathImageProcessor"),
)
# Named as transformers names its own.
FILES = {
    f"{ROOM}.configuration": f"configuration_{PACKAGE}",
    f"{ROOM}.modeling": f"modeling_{PACKAGE}",
    f"{ROOM}.processor": f"processing_{PACKAGE}",
    f"{ROOM}.image_processor": f"image_processing_{PACKAGE}",
}
# What isn't there elsewhere, and what stands in for it.
STAND_INS = {"jaxtyping": f"{ROOM}.shape_words", f"{PACKAGE}.images.examiner": f"{ROOM}.examined_here"}
LICENSE = f"LICENSE.{PACKAGE}"


def add_code(folder: Path) -> None:
    """Add the code to a model folder that is otherwise complete, and tell transformers of it.

    Raises:
        ValueError: The model has parts of one's own, which lie elsewhere.
    """
    contents = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name, *_ in CLASSES}
    check_own_parts(contents)
    for name, text in code().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / LICENSE).write_text(_license(), encoding="utf-8")
    for name, key, module, cls in CLASSES:
        contents[name].setdefault("auto_map", {})[key] = f"{FILES[module]}.{cls}"
    for name, content in sorted(contents.items(), reverse=True):
        write_json(folder / name, content)


def packages_needed(vision_encoder: str, folder: Path) -> list[str]:
    """What must be installed for the code of a folder, beside what these bring along.

    Args:
        vision_encoder: Its name.
        folder: With its tokenizer.
    """
    base = ENCODERS[vision_encoder].base if vision_encoder in ENCODERS else vision_encoder
    more = {"open_clip_torch": base.startswith("open_clip/"), "sentencepiece": (folder / "tokenizer.model").is_file()}
    return ["torch", "transformers", "timm", *(name for name, needed in more.items() if needed)]


def check_own_parts(contents: Mapping[str, Mapping[str, object]]) -> None:
    """Refuse a model that needs other code than this package's; ValueError."""
    for name, content in contents.items():
        if needed := content.get("imports"):
            rule = "--self-contained: a model's parts must be those of this package"
            fix = "leave --self-contained out, and hand the code on beside the folder"
            raise ValueError(f"{rule}; found that {name} needs {needed!r:.120}; {fix}")


@cache
def code() -> Mapping[str, str]:
    """The files by their names; the same for all models."""
    return _Carried().files()


def _license() -> str:
    beside = Path(__file__).parents[2] / "LICENSE"  # where this package is worked on
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    text = distribution(PACKAGE).read_text("licenses/LICENSE")
    assert text is not None
    return text


class _Carried:
    """What of which module is needed, found from the classes on."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleSource] = {}
        self._kept: dict[str, set[int]] = defaultdict(set)  # places of statements by module
        self._needed: set[tuple[str, str]] = set()
        self._others: dict[str, set[str]] = defaultdict(set)  # modules that a module imports
        for _, _, module, cls in CLASSES:
            self._need(module, cls)

    def files(self) -> dict[str, str]:
        """Each module's file."""
        return {f"{_file_of(name)}.py": self._text(module) for name, module in sorted(self._modules.items())}

    def _need(self, module: str, name: str) -> None:
        if (module, name) in self._needed:
            return
        self._needed.add((module, name))
        if module not in self._modules:
            self._modules[module] = ModuleSource(module)
        source = self._modules[module]
        for statement in source.binding(name):
            self._keep(source, statement, name)

    def _keep(self, source: ModuleSource, statement: Statement, name: str) -> None:
        if isinstance(statement.node, Importing):
            self._follow(source.name, statement.node, name)
        place = source.statements.index(statement)
        if place in self._kept[source.name]:
            return
        self._kept[source.name].add(place)
        if isinstance(statement.node, Importing):
            return
        for node, _ in statement.imports_inside():
            for alias in node.names:
                self._follow(source.name, node, alias.asname or alias.name)
        for used in statement.uses:
            self._need(source.name, used)
        for used, attribute in statement.attributes:
            for binding in source.binding(used):
                if (module := _module_bound(binding.node, used)) is not None:
                    self._others[source.name].add(module)
                    self._need(module, attribute)

    def _follow(self, importing: str, node: Importing, bound: str) -> None:
        """Need in another module what an import binds to a name."""
        if not isinstance(node, ast.ImportFrom) or node.module is None or not _is_carried_module(node.module):
            return
        for alias in node.names:
            if (alias.asname or alias.name) == bound and _module_bound(node, bound) is None:
                self._others[importing].add(_stand_in(node.module))
                self._need(_stand_in(node.module), alias.name)

    def _below(self, module: str) -> set[str]:
        """The modules that one imports, and those that they import."""
        found: set[str] = set()
        waiting = [module]
        while waiting:
            new = self._others[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    def _text(self, module: ModuleSource) -> str:
        kept = [module.statements[place] for place in sorted(self._kept[module.name])]
        imports = [one.node for one in kept if isinstance(one.node, Importing)]
        used: set[str] = set().union(*(one.uses for one in kept))
        written = [text for node in imports if (text := _import_text(node, used))]
        lines = sorted(written, key=lambda line: line.startswith("from ."))  # others' before ours
        head = f"# Of {PACKAGE} {__version__}, {module.name}: what a model folder needs of it. Licence: {LICENSE}"
        if module.name in FILES:
            lines.append(
                "# What the others import: transformers 4 copies a first file with those that it names, and no more."
            )
            lines += [f"from .{_file_of(name)} import __doc__ as _" for name in sorted(self._below(module.name))]
        text = "\n".join((f'{head}.\n"""{module.summary}"""\n', "from __future__ import annotations\n", *lines, ""))
        for one in kept:
            if not isinstance(one.node, Importing):
                text += one.space_above + one.text(_rewritten) + "\n"
        return text


def _stand_in(module: str) -> str:
    return STAND_INS.get(module, module)


def _is_carried_module(name: str) -> bool:
    return name in STAND_INS or name.partition(".")[0] == PACKAGE


def _file_of(module: str) -> str:
    return FILES.get(module) or module.replace(".", "_")


def _module_bound(node: ast.stmt, name: str) -> str | None:
    """The module of ours that an import binds to a name, if it is one."""
    if not isinstance(node, ast.ImportFrom) or node.module is None or not _is_carried_module(node.module):
        return None
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        if (alias.asname or alias.name) == name and file_of_module(full):
            return full
    return None


def _import_text(node: Importing, used: set[str] | None = None) -> str:
    """An import as it stands in the folder, of the names that are used; none by None."""
    aliases = [one for one in node.names if used is None or (one.asname or one.name.partition(".")[0]) in used]
    if not aliases:
        return ""
    if isinstance(node, ast.Import):
        return "\n".join(f"import {_alias(one)}" for one in aliases)
    assert node.module is not None
    if not _is_carried_module(node.module):
        return f"from {node.module} import {', '.join(map(_alias, aliases))}"
    lines = []
    for one in aliases:
        if (module := _module_bound(node, one.asname or one.name)) is None:
            continue
        lines.append(f"from . import {_file_of(module)} as {one.asname or one.name}")
    if names := [_alias(one) for one in aliases if _module_bound(node, one.asname or one.name) is None]:
        lines.append(f"from .{_file_of(_stand_in(node.module))} import {', '.join(names)}")
    return "\n".join(lines)


def _rewritten(node: Importing, in_try: bool) -> str:
    """An import inside of a statement: what is asked for late may be missing, which transformers allows in a `try`."""
    text = _import_text(node)
    ours = isinstance(node, ast.ImportFrom) and node.module is not None and _is_carried_module(node.module)
    return text if ours or in_try else f"try:\n    {text}\nexcept ImportError:\n    raise"


def _alias(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name
