"""How parts of one's own come in: modules and files that a YAML names, entry points of packages that are installed.

A plain subclass in an imported module is a part; its name is that of the class in snake_case. Nothing is imported but
what a YAML or a command says by name, and of installed packages what a YAML uses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module, invalidate_caches
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, get_args

from composer_path.own_parts.kinds import base_of, lacks, snake_name, taken_names
from composer_path.own_parts.registry import Kind, OwnPart, all_parts, set_parts

GROUP = "composer_path"  # of entry points: composer_path.callbacks and so on


class ImportsError(ValueError):
    """What `imports` names can't be imported, or doesn't hold what it should; one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))


def import_parts(imports: Sequence[str], folder: str | Path = ".") -> None:
    """Import modules and files, and know their parts beside those that are known.

    Args:
        imports: Names of modules (`my_package.parts`), and files (`./my_parts.py`).
        folder: Where relative files lie.

    Raises:
        ImportsError: One of them can't be imported, or a name is taken.
    """
    _know([*(part for part in all_parts() if part.source not in map(source_of, imports))], imports, folder, ())


def use_imports(imports: Sequence[str], folder: Path, words: Iterable[str]) -> None:
    """Know the parts of these modules and files, those of installed packages that `words` name, and no others.

    Raises:
        ImportsError: See `import_parts`.
    """
    set_parts(())
    _know([], imports, folder, set(words))


def source_of(name: str) -> str:
    """What a module or file is called where its folder doesn't matter."""
    return Path(name).name if is_file_name(name) else name


def is_file_name(name: str) -> bool:
    """Whether it names a file rather than a module."""
    return name.endswith(".py") or "/" in name


def located(name: str, folder: Path) -> str:
    """A file's whole path; a module's name as it is."""
    return str((folder / Path(name).expanduser()).resolve()) if is_file_name(name) else name


def file_of(name: str) -> Path | None:
    """The file of an imported module or file, or a package's folder; None where it has none."""
    if is_file_name(name):
        return Path(name)
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    return Path(file).parent if hasattr(module, "__path__") else Path(file)


@lru_cache(maxsize=1)
def installed_parts(path: tuple[str, ...]) -> dict[str, list[Any]]:
    """Our groups' entry points of all packages on Python's path, looked up once: there may be hundreds of packages."""
    everything = entry_points()  # reads no package's metadata, which would take ten times as long
    return {group: list(everything.select(group=group)) for group in (f"{GROUP}.{kind}" for kind in get_args(Kind))}


def _know(known: list[OwnPart], imports: Sequence[str], folder: str | Path, words: Iterable[str]) -> None:
    problems: list[str] = []
    parts = list(known)
    for name in imports:
        try:
            module = _load_file(located(name, Path(folder))) if is_file_name(name) else _load_module(name, Path(folder))
            found = list(_parts_in(module, source_of(name), problems, f"imports: '{source_of(name)}'"))
            if not found and not problems:
                fix = "it must define a subclass of what Composer or this project calls an algorithm, callback, …"
                problems.append(f"imports: '{name}' holds no part; {fix} (docs/extending.md)")
            parts += found
        except ImportsError as error:
            problems += error.problems
    mentioned = set(words)
    for kind in get_args(Kind):
        for entry in installed_parts(tuple(sys.path)).get(f"{GROUP}.{kind}", ()):
            if entry.name in mentioned:
                parts += _parts_of_entry(kind, entry, problems)
    problems += _clashes(parts)
    if problems:
        raise ImportsError(list(dict.fromkeys(problems)))
    set_parts(parts)


def _clashes(parts: Sequence[OwnPart]) -> Iterator[str]:
    seen: dict[tuple[Kind, str], OwnPart] = {}
    for part in parts:
        other = seen.setdefault((part.kind, part.name), part)
        if other is not part and other.cls is not part.cls:
            both = f"'{other.source}' and '{part.source}'" if other.source != part.source else f"'{part.source}' twice"
            yield f"imports: {part.kind} must have names of their own, found {part.name} in {both}; rename one class"
        if part.name in taken_names(part.kind):
            fix = "rename the class"
            yield f"imports: '{part.source}' defines {part.kind} {part.name}, a name that is taken already; {fix}"


def _parts_in(module: ModuleType, source: str, problems: list[str], where: str) -> Iterator[OwnPart]:
    """The parts that a module, or a package's own modules, define; those that miss something are problems."""
    for name, member in list(vars(module).items()):
        if not inspect.isclass(member) or name.startswith("_") or member.__name__.startswith("_"):
            continue
        if f"{member.__module__}.".startswith(f"{module.__name__}.") and (kind := base_of(member)) is not None:
            if why := lacks(kind, member):
                problems.append(f"{where}: {kind} {snake_name(member.__name__)}: class {member.__name__} {why}")
            else:
                yield _part(kind, member, source)


def _part(kind: Kind, cls: Any, source: str) -> OwnPart:
    name = snake_name(cls.__name__)
    if kind == "templates":
        cls.name = name  # which it is exported by
    return OwnPart(kind, name, cls, source)


def _parts_of_entry(kind: Kind, entry: Any, problems: list[str]) -> Iterator[OwnPart]:
    package = entry.dist.name if entry.dist is not None else "?"
    where = f"entry point {GROUP}.{kind} '{entry.name}' of package {package}"
    try:
        cls = entry.load()
    except (Exception, SystemExit) as error:
        problems.append(f"{where}: can't be imported: {_why(error)}; mend or remove the package")
        return
    if not inspect.isclass(cls) or base_of(cls) != kind:
        problems.append(f"{where}: must name a class of {kind}, found {type(cls).__name__} {entry.value}")
    elif snake_name(cls.__name__) != entry.name:
        fix = f"call it {snake_name(cls.__name__)}"
        problems.append(f"{where}: must be named as its class {cls.__name__} in snake_case; {fix}")
    elif why := lacks(kind, cls):
        problems.append(f"{where}: class {cls.__name__} {why}")
    else:
        yield _part(kind, cls, entry.module)


def _load_module(name: str, folder: Path) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        fix = "write my_package.my_parts, or ./my_parts.py for a file beside the YAML"
        raise ImportsError([f"imports: found '{name}', which is no name of a module; {fix}"])
    invalidate_caches()
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if missing and (beside := folder / f"{name}.py").is_file():
            raise ImportsError([f"imports: found no module '{name}'; did you mean ./{beside.name}?"]) from None
        if missing:
            fix = "install it, put its folder on PYTHONPATH, or name a file, as in ./my_parts.py"
            raise ImportsError([f"imports: found no module '{name}'; {fix}"]) from None
        raise ImportsError([f"imports: '{name}' can't be imported: {_why(error)}; mend it there"]) from error


def _load_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ImportsError([f"imports: must name a Python file, found {found} at '{path}'; correct the path"])
    if file.suffix != ".py" or not file.stem.isidentifier():
        fix = "call it as a Python module is called, such as my_parts.py"
        raise ImportsError([f"imports: '{file.name}' is no name of a Python file; {fix}"])
    before = sys.modules.get(file.stem)
    if before is None or not hasattr(before, "__composer_path_file__"):
        other = _other_module(file.stem)
        if other is not None and other != file:
            fix = "rename the file"
            raise ImportsError([f"imports: '{file.name}' has the name of another module, {file.stem}; {fix}"])
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    module.__composer_path_file__ = path  # type: ignore[attr-defined]
    sys.modules[file.stem] = module
    try:
        code = compile(file.read_bytes(), path, "exec", dont_inherit=True)  # anew: an edited file may have its old time
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        if before is None:
            sys.modules.pop(file.stem, None)
        else:
            sys.modules[file.stem] = before
        raise ImportsError([f"imports: '{file.name}' can't be imported: {_why(error)}; mend it there"]) from error
    return module


def _other_module(name: str) -> Path | None:
    """Where a module of this name lies that Python itself would import; None where there is none."""
    module = sys.modules.get(name)
    if module is not None:
        return Path(getattr(module, "__file__", None) or "built in").resolve()
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None else Path(spec.origin or "built in").resolve()


def _why(error: BaseException) -> str:
    """Where an import failed, and at what, in a line."""
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or '?').name}, line {error.lineno}"
        return f"{place}: {type(error).__name__}: {error.msg}"
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    ours = str(Path(__file__).parent)
    skipped = [one for one in frames if not one[0].startswith((ours, "<frozen")) and "importlib" not in one[0]]
    frames = skipped or frames
    first = Path(frames[0][0])
    beside = [one for one in frames if Path(one[0]).parent == first.parent]  # not within a library that it calls
    where, line = beside[-1] if first.parent.name != "site-packages" else frames[0]
    return f"{Path(where).name}, line {line}: {type(error).__name__}: {' '.join(str(error).split())}"


def words_of(value: Any) -> Iterator[str]:
    """All keys and texts in plain values."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield str(key)
            yield from words_of(member)
    elif isinstance(value, list):
        for member in value:
            yield from words_of(member)
    elif isinstance(value, str):
        yield value
