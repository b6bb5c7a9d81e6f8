"""The image folder: which file a record's image name means, and that it lies inside."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from composer_path.records.rules import RecordError


def resolve_image(name: str, images_dir: str | Path) -> Path:
    """Find an image's file, refusing every name that leads out of the image folder.

    Args:
        name: Path relative to the image folder, as the record gives it.
        images_dir: The image folder; it may itself be a symbolic link.

    Returns:
        The file's path with all symbolic links followed.

    Raises:
        RecordError: 'path-outside-folder' or 'missing-file'.
    """
    fix = "name the file relative to the image folder and keep it inside"
    if name.startswith("/") or PureWindowsPath(name).drive:
        raise RecordError("path-outside-folder", "an absolute path", fix)
    if ".." in name.replace("\\", "/").split("/"):
        raise RecordError("path-outside-folder", "'..' in its path", fix)
    fix = "check the name and the image folder"
    try:
        folder = Path(images_dir).resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            fix = "copy the file into the folder"
            raise RecordError("path-outside-folder", "a symbolic link that leads out", fix)
        if path.is_file():
            return path
        found = "a folder" if path.is_dir() else "something else" if path.exists() else "no such file"
    except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
        found = "a path that the file system refuses"
    except RecordError:
        raise
    except ValueError:
        found = "a name with a null character"
    raise RecordError("missing-file", found, fix)
