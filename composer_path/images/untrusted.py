"""A picture of somebody else's, as a file or as its bytes: examined as a conversion does, then as a model sees it."""

from __future__ import annotations

from pathlib import Path

from composer_path.images.examiner import Examiner
from composer_path.images.pixels import ImagePreparation, Pixels
from composer_path.records.rules import ImageError


def load_untrusted(data: bytes, images: ImagePreparation, examiner: Examiner | None = None) -> Pixels:
    """The picture in the bytes of an image file; raises `ImageError` where a conversion would refuse it."""
    examiner = examiner or Examiner()  # what a conversion would store, and its answer to what it wouldn't
    return images.load_stored(examiner.examine(data, images.max_pixels, images.scale_levels).data)


def load_untrusted_file(path: str | Path, images: ImagePreparation) -> Pixels:
    """The picture of an image file; raises ValueError where there is none, or a conversion would refuse it."""
    require_file(path)
    try:
        return load_untrusted(Path(path).read_bytes(), images)
    except ImageError as error:
        raise ValueError(f"image '{path}': {error}") from None


def require_file(path: str | Path) -> None:
    """Refuse, by ValueError, a path where no file lies."""
    if not Path(path).is_file():
        raise ValueError(f"image '{path}': {'it is a folder' if Path(path).is_dir() else 'there is no such file'}")
