"""The image folder: which file a record's image name means, and that it lies inside."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from composer_path.records.rules import RecordError


def resolve_image(name: str, images_dir: str | Path) -> Path:
    """Find an image's file, links followed, refusing every name that leads out of the image folder (or a link to it).

    Raises:
        RecordError: 'path-outside-folder' or 'missing-file'.
    """
    fix = "name the file relative to the image folder and keep it inside"
    if name.startswith("/") or PureWindowsPath(name).drive:
        raise RecordError("path-outside-folder", "an absolute path", fix)
    if ".." in name.replace("\\", "/").split("/"):
        raise RecordError("path-outside-folder", "'..' in its path", fix)
    found = None  # it leads out
    try:
        folder = Path(images_dir).resolve()
        path = (folder / name).resolve()
        if path.is_relative_to(folder):
            if path.is_file():
                return path
            found = "a folder" if path.is_dir() else "something else" if path.exists() else "no such file"
    except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
        found = "a path that the file system refuses"
    except ValueError:
        found = "a name with a null character"
    if found is not None:
        raise RecordError("missing-file", found, "check the name and the image folder")
    raise RecordError("path-outside-folder", "a symbolic link that leads out", "copy the file into the folder")
