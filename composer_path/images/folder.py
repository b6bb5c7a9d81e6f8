"""The image folder: which file a record's image name means, and that it lies inside.

What is missing is described by how a name that is there differs from it; the names themselves may tell who is meant.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from composer_path.records.rules import RecordError

# At the end of a name: the file has one of the endings of pictures; exactly one such file must be there.
ANY_ENDING = ".*"
_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".svs")
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]{1,20}):(//|)", re.ASCII)
# A folder with more files isn't looked through for names that are alike.
_MAX_LISTED = 100_000


def resolve_image(name: str, images_dir: str | Path) -> Path:
    """Find an image's file, links followed, refusing every name that leads out of the image folder (or a link to it).

    Raises:
        RecordError: 'path-outside-folder' or 'missing-file'.
    """
    check_name(name)
    found = None  # it leads out
    try:
        folder = Path(images_dir).resolve()
        path = (folder / name_of_any_ending(name, folder)).resolve()
        if path.is_relative_to(folder):
            if path.is_file():
                return path
            found = "a folder" if path.is_dir() else "something else" if path.exists() else None
            found = found or _no_such_file(name, folder)
    except RecordError:
        raise
    except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
        found = "a path that the file system refuses"
    except ValueError:
        found = "a name with a null character"
    if found is not None:
        raise RecordError("missing-file", found, "check the name and the image folder")
    raise RecordError("path-outside-folder", "a symbolic link that leads out", "copy the file into the folder")


def check_name(name: str) -> None:
    """Refuse a name that can't lie inside the image folder; nothing is ever fetched.

    Raises:
        RecordError: 'path-outside-folder'.
    """
    fix = "name the file relative to the image folder and keep it inside"
    if match := _ADDRESS.match(name):
        scheme = match[1].lower()
        if scheme == "data":
            found = "a data URL, which is the picture itself as text"
            raise RecordError("path-outside-folder", found, "save the picture as a file and name it")
        if match[2] or scheme in ("http", "https", "file"):
            found = "an address with a scheme, and nothing is fetched from one"
            raise RecordError("path-outside-folder", found, "copy the file into the image folder and name it")
    if name.startswith("/") or PureWindowsPath(name).drive:
        raise RecordError("path-outside-folder", "an absolute path", fix)
    if ".." in name.replace("\\", "/").split("/"):
        raise RecordError("path-outside-folder", "'..' in its path", fix)


def names_of_any_ending(name: str) -> list[str]:
    """Return the names that a name may stand for: itself, unless it ends in `ANY_ENDING`."""
    if not name.endswith(ANY_ENDING):
        return [name]
    stem = name.removesuffix(ANY_ENDING)
    return [stem + ending for one in _ENDINGS for ending in (one, one.upper())]


def name_of_any_ending(name: str, folder: str | Path) -> str:
    """Return the name of the only file in a folder that a name stands for; itself if it isn't so."""
    names = names_of_any_ending(name)
    there = [one for one in names if os.path.isfile(os.path.join(folder, one))] if len(names) > 1 else names
    if len({os.path.normcase(one).lower() for one in there}) > 1:
        found = f"{len(there)} files that differ in their endings"
        raise RecordError("missing-file", found, "leave one of them in the image folder")
    return there[0] if there else name


# How a name that is there may differ, from the smallest difference on.
_DIFFERENCES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("has '/' where it has '\\'", lambda name: name.replace("\\", "/")),
    ("has no blanks at its ends", lambda name: "/".join(part.strip() for part in name.split("/"))),
    ("is spelled without % escapes", unquote),
    ("has its accents encoded in another way (NFC, NFD)", lambda name: unicodedata.normalize("NFC", name)),
    ("differs in capitals", str.casefold),
    ("has another ending", lambda name: name.removesuffix(PurePosixPath(name).suffix)),
)


def _no_such_file(name: str, folder: Path) -> str:
    """Say that a file is missing, and how the name of one that is there differs from its name."""
    for words, change in _DIFFERENCES:
        if _is_there(name, folder, change):
            return f"no such file, but one whose name {words}"

    def all_changes(text: str) -> str:
        for _, change in _DIFFERENCES:
            text = change(text)
        return text

    if _is_there(name, folder, all_changes):
        return (
            "no such file, but one whose name differs in several of these: '\\', blanks, %, accents, capitals, ending"
        )
    parts = name.replace("\\", "/").split("/")
    if len(parts) > 1 and (folder / parts[-1]).is_file():
        return "no such file, but one of its name without the folders before it"
    return "no such file"


def _is_there(name: str, folder: Path, change: Callable[[str], str]) -> bool:
    """Whether a file is there whose path becomes the same by a change; each folder on the way is looked through."""
    parts = [part for part in change(name).split("/") if part not in ("", ".", "..")]
    for number, part in enumerate(parts):
        wanted = change(part)
        alike = [one for one in _listed(str(folder)) if one == part or change(one) == wanted]
        kind = Path.is_file if number == len(parts) - 1 else Path.is_dir
        alike = [one for one in alike if kind(folder / one)]
        if not alike:
            return False
        folder = folder / alike[0]
    return bool(parts)


@lru_cache(maxsize=8)
def _listed(folder: str) -> tuple[str, ...]:
    """Return the names in a folder, in order; none if there are too many."""
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > _MAX_LISTED:
                return ()
    return tuple(sorted(names))
