"""A rectangle of a whole-slide image, read with OpenSlide: only the scan, never the label or the overview picture.

A record names one as `{"file": "a.svs", "x": 5000, "y": 7200, "width": 448, "height": 448, "level": 0}`. OpenSlide
comes with `pip install 'composer_path[wsi]'` and reads SVS, TIFF, DICOM and more. What lies outside of the scan is
white: OpenSlide leaves it transparent, and the glass around a section is white.
"""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from composer_path.images.file import MAX_PIXELS
from composer_path.images.tiff import is_in_strips
from composer_path.records.rules import ImageError

if TYPE_CHECKING:
    from openslide import OpenSlide

# Open slides for each process, with up to 32 MB of decoded tiles each. Records of one slide mostly follow each other.
_NUM_OPEN_SLIDES = 4

Result = TypeVar("Result")


class OpenSlideMissing(ImportError):
    """OpenSlide isn't installed. No fault of a record, so it ends a conversion at once."""


@dataclass(frozen=True)
class SlideRegion:
    """A rectangle of a slide, as a record gives it; `str` names it in one word.

    Attributes:
        file: The slide, a path relative to the image folder. Of a slide of several files (DICOM, MRXS) any or the
            main one; the others lie beside it.
        x: Left edge in pixels of level 0; may be negative.
        y: Top edge in pixels of level 0; may be negative.
        width: In pixels of `level`.
        height: In pixels of `level`.
        level: Of the slide's pyramid, 0 is the largest.
    """

    file: str
    x: int
    y: int
    width: int
    height: int
    level: int = 0

    @classmethod
    def from_record(cls, region: Mapping[str, Any]) -> SlideRegion:
        """Build it from a record's checked object, in which null counts as absent."""
        return cls(**{key: value for key, value in region.items() if value is not None})

    def __str__(self) -> str:
        """The same for the same region, different for any other."""
        return f"{self.file}#x={self.x},y={self.y},width={self.width},height={self.height},level={self.level}"


def require_openslide() -> None:
    """Raise `OpenSlideMissing` where it is."""
    try:
        import openslide  # noqa: F401
    except ImportError as error:
        raise OpenSlideMissing(
            "slide regions are read with OpenSlide, which isn't installed here; pip install 'composer_path[wsi]'"
        ) from error


def read_region(path: str | Path, region: SlideRegion, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a rectangle of the slide at `path`, once it has no more than `max_pixels`: OpenSlide's on white, as RGB.

    Raises:
        ImageError: `unreadable-image`, `unknown-level`, `region-outside` or `too-many-pixels`.
        OpenSlideMissing: The package isn't there.
    """
    x, y, width, height, level = region.x, region.y, region.width, region.height, region.level
    size = f"a region of {width} x {height} pixels"
    if width < 1 or height < 1:
        raise ImageError("region-outside", size, "give it a width and a height")
    if width * height > max_pixels:
        raise ImageError("too-many-pixels", size, f"take a smaller one, or raise max_pixels (now {max_pixels})")

    def read(slide: OpenSlide) -> Image.Image:
        downsample = _downsample(slide, level)
        slide_width, slide_height = slide.dimensions
        beside = x >= slide_width or x + width * downsample <= 0
        if beside or y >= slide_height or y + height * downsample <= 0:
            found = f"{size} at x={x}, y={y}, level {level} of a slide of {slide_width} x {slide_height} pixels"
            raise ImageError("region-outside", found, "give x and y in pixels of level 0")
        scan = slide.read_region((x, y), level, (width, height))
        pixels = Image.new("RGB", scan.size, "white")
        pixels.paste(scan, mask=scan.getchannel("A"))
        return pixels

    return _with_slide(path, read)


def region_png(path: str | Path, region: SlideRegion, max_pixels: int = MAX_PIXELS) -> bytes:
    """Read a region as a PNG file of its pixels alone, free of metadata; raises as `read_region`."""
    return png_of(read_region(path, region, max_pixels))


def png_of(region: Image.Image) -> bytes:
    """A region as it is stored."""
    file = io.BytesIO()
    region.save(file, "PNG")
    return file.getvalue()


def mpp_of(path: str | Path, level: int = 0) -> float | None:
    """Micrometres per pixel of a level, as the slide's file says; None if it doesn't say. Raises as `read_region`."""

    def read(slide: OpenSlide) -> float | None:
        downsample = _downsample(slide, level)
        try:
            mpp = float(slide.properties.get("openslide.mpp-x", "nan")) * downsample
        except ValueError:
            return None
        return mpp if 0 < mpp < math.inf else None

    return _with_slide(path, read)


def _downsample(slide: OpenSlide, level: int) -> float:
    """How many pixels of level 0 a pixel of `level` is wide."""
    if not 0 <= level < slide.level_count:
        found = f"level {level} of a slide that has {slide.level_count} (counted from 0)"
        raise ImageError("unknown-level", found, "choose one that is there")
    return slide.level_downsamples[level]


def _with_slide(path: str | Path, read: Callable[[OpenSlide], Result]) -> Result:
    """Call `read` with the open slide; OpenSlide's errors, which may quote the file, become ours."""
    require_openslide()
    from openslide import OpenSlide, OpenSlideError, OpenSlideUnsupportedFormatError

    try:
        status = os.stat(path)
        try:
            return read(_open_slide(str(path), status.st_mtime_ns, status.st_size, os.getpid()))
        except OpenSlideUnsupportedFormatError:
            raise
        except OpenSlideError:
            # A slide that failed once fails for ever, also for regions that are whole: open it anew.
            _open_slide.cache_clear()
            with OpenSlide(path) as slide:
                return read(slide)
    except OpenSlideUnsupportedFormatError:
        found, fix = _no_slide(path)
    except OpenSlideError:
        found, fix = "a slide that is truncated or damaged", "replace the file"
    except OSError as error:
        found, fix = error.strerror or "a read error", "check the file's rights"
    raise ImageError("unreadable-image", found, fix)


def _no_slide(path: str | Path) -> tuple[str, str]:
    """What a file is that OpenSlide doesn't open, and what to do."""
    # Nothing can be mapped of an empty file, and a folder isn't opened.
    with suppress(ValueError, OSError), open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            in_strips = is_in_strips(data)
        if in_strips:
            found = "a TIFF file in strips, and OpenSlide reads tiled ones"
            fix = "make it tiled (vips tiffsave IN OUT --tile --pyramid --compression jpeg --Q 90), or leave x out"
            return found, fix
    return "a file that OpenSlide doesn't know as a slide", "name an SVS, TIFF or DICOM file, or leave x out"


@lru_cache(maxsize=_NUM_OPEN_SLIDES)
def _open_slide(path: str, modified: int, size: int, process: int) -> OpenSlide:
    """Open a slide, once as long as its file stays the same; a forked process opens its own."""
    from openslide import OpenSlide

    return OpenSlide(path)
