"""A JSON file that another program wrote: one object, each key once, only what JSON knows; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZE_LIMIT = 64 * 2**20  # an index of the largest model has a hundredth of it


def read_json_object(path: str | Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        ValueError: It can't be read, isn't JSON, or isn't an object; a key is there twice, or a number is none.
    """
    path = Path(path)
    where, fix = f"'{path}': must be one JSON object", "take the file as its program wrote it"
    try:
        if not path.is_file() or path.stat().st_size > SIZE_LIMIT:
            raise ValueError(f"found {'more than 64 MiB' if path.is_file() else 'no file'}")
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}; found {error.msg.lower()} in line {error.lineno}; {fix}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}; found {type(error).__name__} when reading it; {fix}") from None
    except ValueError as error:  # ours, or Python's of a number with thousands of digits
        why = str(error) if str(error).startswith("found") else "found a number that is too long"
        raise ValueError(f"{where}; {why}; {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}; found a {type(content).__name__}; {fix}")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"found the key {twice!r:.80} twice")
    return content


def _no_number(word: str) -> Any:
    raise ValueError(f"found {word}, which is no number")


def file_inside(folder: str | Path, name: object) -> Path:
    """The path of a file that another one names, which may lie in the folder only, links followed.

    A snapshot of Hugging Face's cache is made of links to the `blobs` beside it, which belong to it.

    Raises:
        ValueError: It leads elsewhere, whether or not something is there.
    """
    folder = Path(folder)
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise ValueError(f"'{folder}': must name files inside of it, found {name!r:.120}; take the folder it came from")
    path, home = folder / name, folder.resolve()
    places = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise ValueError(
            f"'{path}': must lie inside of its folder, found a link that leads outside; copy the file there"
        )
    return path
