"""A folder with an export in it, written whole, and over nothing but what an export wrote there before.

A format has no place that says who wrote its files, so a small file beside them lists what is ours.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath

from composer_path import __version__
from composer_path.asking.run_table import EVALUATION
from composer_path.hugging_face.model_config import MODEL_TYPE
from composer_path.storage.atomic import TEMPORARY_SUFFIX
from composer_path.storage.json_object import read_json_object
from composer_path.storage.lock import locked
from composer_path.weights.folder import write_json
from composer_path.weights.model_folder import is_model_folder

WRITTEN = "composer_path.json"  # which files of a folder an export wrote, and in which shape
_ENTRIES = ("config.json", "adapter_config.json")  # without which nobody reads the others: first to go, last to come
_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx")
# The only files below a folder's own that an export writes: a list that names others isn't ours.
_NESTED = re.compile(r"(adapters/)?(language_model|vision_encoder)/adapter_(config\.json|model\.safetensors)")
_PLACE = "choose another place"


def publish(
    folder: Path,
    shape: str,
    write: Callable[[Path], None],
    *,
    unlisted: Callable[[str], bool] = lambda name: False,
    keep: Collection[str] = (),
) -> None:
    """Replace what an earlier export wrote by what `write` writes into an empty folder.

    An evaluation of the earlier model goes with it. Nothing changes where `write` fails. A kill while names change
    loses nothing but what was being replaced: the list has all of it, so that the next export takes its place.

    Args:
        folder: Made where it isn't there.
        shape: What is written.
        write: Called with an empty folder.
        unlisted: Which files of a model folder are its model's, where a version wrote it that kept no list.
        keep: Names that stay as they are; `write` leaves them out.

    Raises:
        ValueError: `folder` is a file, holds another program's files under these names, or another export is at work.
    """
    written_before(folder, shape)
    with locked(folder, "export", "wait for it, or " + _PLACE):
        _clear_killed(folder)
        # Inside, as the folder may be a mount, a link or somebody's place.
        new = folder / f".{os.getpid()}{TEMPORARY_SUFFIX}"
        try:
            new.mkdir()
            write(new)
            _replace(folder, new, shape, written_before(folder, shape, unlisted) - set(keep))
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _clear_killed(folder: Path) -> None:
    """Remove what killed exports left; nobody else is at work."""
    for path in folder.iterdir():
        if re.fullmatch(rf"\.\d+{re.escape(TEMPORARY_SUFFIX)}", path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, new: Path, shape: str, earlier: set[str]) -> None:
    names = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
    if others := sorted(name for name in names if _is_others(folder, name, earlier)):
        raise ValueError(f"'{folder}': must not hold files that no export wrote, found {others[0]}; {_PLACE}")
    _note(folder, shape, names | earlier)
    stale = earlier - names - {WRITTEN} | ({EVALUATION} if earlier else set())
    for name in sorted(stale | set(filter(_is_entry, earlier)), key=lambda name: (not _is_entry(name), name)):
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there
            for parent in PurePosixPath(name).parents[:-1]:
                (folder / parent).rmdir()
    for name in sorted(names, key=lambda name: (_is_entry(name), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(folder / name)
    _note(folder, shape, names)


def _note(folder: Path, shape: str, names: set[str]) -> None:
    files = sorted(names - {WRITTEN})
    write_json(folder / WRITTEN, {"shape": shape, "files": files, "composer_path": __version__})


def _is_entry(name: str) -> bool:
    return PurePosixPath(name).name in _ENTRIES


def _is_others(folder: Path, name: str, earlier: set[str]) -> bool:
    """Whether something stands where a file is to go, that no export wrote."""
    around = [folder / parent for parent in PurePosixPath(name).parents if parent.name]
    if any(os.path.lexists(path) and (path.is_symlink() or not path.is_dir()) for path in around):
        return True
    return name not in earlier and os.path.lexists(folder / name)


def written_before(folder: Path, shape: str, unlisted: Callable[[str], bool] = lambda name: False) -> set[str]:
    """The files of a folder that earlier exports wrote, which one in this shape may replace. See `publish`.

    Raises:
        ValueError: `folder` is a file, or holds a model that isn't such an export.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        found = "a file" if folder.exists() else "a link that leads nowhere"
        raise ValueError(f"'{folder}': must be a folder, or not be there; found {found}; {_PLACE}")
    rule = "must be empty or hold an earlier export" + ("" if shape == MODEL_TYPE else " in a shape of --as")
    if (folder / WRITTEN).is_file():
        said = read_json_object(folder / WRITTEN)
        names, was = said.get("files"), said.get("shape")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"'{folder / WRITTEN}': must list files; found something else; {_PLACE}")
        if shape != was and MODEL_TYPE in (shape, was):  # whose place another one's files would take
            found = "a whole model of ours" if was == MODEL_TYPE else f"one in the shape {was!r:.40}"
            raise ValueError(f"'{folder}': {rule}, found {found}; {_PLACE}")
        return {WRITTEN, *(name for name in names if _lies_inside(folder, name))}
    if shape == MODEL_TYPE and is_model_folder(folder):
        return {path.name for path in folder.iterdir() if unlisted(path.name) and path.is_file()}
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if weights := [name for name in there if name.endswith(_WEIGHTS)]:
        raise ValueError(f"'{folder}': {rule}, found {weights[0]}; {_PLACE}")
    return set()


def _lies_inside(folder: Path, name: str) -> bool:
    """Whether a listed name is a file of the folder, or one of adapters in a folder that is no link."""
    if (PurePosixPath(name).name != name and not _NESTED.fullmatch(name)) or "\0" in name:
        return False
    around = [folder / parent for parent in PurePosixPath(name).parents if parent.name]
    return (folder / name).is_file() and not any(parent.is_symlink() for parent in around)
