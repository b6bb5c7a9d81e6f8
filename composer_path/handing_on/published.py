"""A folder in somebody else's format, written whole, beside or over nothing but what this project wrote there before.

Other programs' formats have no place that says who wrote them, so a small file beside them lists what is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer_path import __version__
from composer_path.asking.run_table import EVALUATION
from composer_path.storage.atomic import replace_files
from composer_path.storage.json_object import read_json_object
from composer_path.weights.folder import write_json

WRITTEN = "composer_path.json"  # which files of a folder an export wrote, and in which shape


def publish(folder: Path, shape: str, write: Callable[[Path], None]) -> None:
    """Replace what an earlier export wrote by what `write` writes into an empty folder.

    An evaluation of the earlier model goes with it. Nothing changes where `write` fails.

    Raises:
        ValueError: `folder` is a file, or holds another program's files under these names.
    """
    earlier = written_before(folder)

    def write_and_check(new: Path) -> None:
        write(new)
        names = sorted(path.name for path in new.iterdir())
        if others := [name for name in names if name not in earlier and (folder / name).exists()]:
            fix = "choose another place"
            raise ValueError(f"'{folder}': must not hold files that no export wrote, found {others[0]}; {fix}")
        write_json(new / WRITTEN, {"shape": shape, "files": names, "composer_path": __version__})

    made = not folder.exists()
    try:
        replace_files(folder, write_and_check, lambda name: name in earlier or name == EVALUATION, last=WRITTEN)
    except BaseException:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def written_before(folder: Path) -> set[str]:
    """The files of a folder that an earlier export in a shape wrote.

    Raises:
        ValueError: `folder` is a file, or holds a model that isn't such an export.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}': must be a folder, or not be there; found a file; choose another place")
    if not (folder / WRITTEN).is_file():
        weights = (".safetensors", ".bin", ".pt", ".onnx")
        found = sorted(path.name for path in folder.iterdir() if path.suffix in weights) if folder.is_dir() else []
        if found:
            rule = "must be empty or hold an earlier export of this shape"
            raise ValueError(f"'{folder}': {rule}, found {found[0]}; choose another place")
        return set()
    names = read_json_object(folder / WRITTEN).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{folder / WRITTEN}': must list files; found something else; choose another place")
    return {WRITTEN, *(name for name in names if (folder / name).is_file() and Path(name).name == name)}
