"""Reads the images that records name, from a folder or a bucket, into what is stored of them in a shard."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import xxhash

from composer_path.conversion.options import ConvertOptions
from composer_path.images.file import check_image, sanitize_image
from composer_path.images.folder import check_name, name_of_any_ending, names_of_any_ending, resolve_image
from composer_path.images.jpeg import is_jpeg
from composer_path.images.stored_square import Square
from composer_path.records.rules import RecordError
from composer_path.records.slide_region import SlideRegion, mpp_of, region_png
from composer_path.storage.places import Bucket, copy_to_disk, is_remote

# One picture is often asked about in several records in a row: it is read and decoded once.
_CACHE_BYTES = 32 * 2**20
# Slides of a bucket that stay on the disk after they were read, some gigabytes each; a slide is read in many regions.
_NUM_KEPT_SLIDES = 2
_NONE: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class StoredImage:
    """What is stored of an image."""

    data: bytes  # an image file free of metadata, or a finished square
    hash: int  # xxh64 of `data`, by which equal images are counted
    mpp: float | None = None  # micrometres per pixel as a slide's file says it


class ImageSource:
    """The image folder of a conversion, or its address in a bucket."""

    def __init__(self, images: str, options: ConvertOptions) -> None:
        self._images, self._max_pixels = images, options.max_pixels
        self._decode, self._resized = options.check == "full", options.resized
        self._bucket = Bucket(images) if is_remote(images) else None
        self._stored: OrderedDict[str, StoredImage | RecordError] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def load(self, image: str | SlideRegion, embedded: Mapping[str, bytes] = _NONE) -> StoredImage:
        """Read an image, or take one that lies in the record itself, and make of it what is stored.

        A `RecordError` says that it isn't there or can't be used, a `StorageError` that the bucket doesn't answer.
        """
        name = str(image)
        if name in embedded:
            taken = self._load(image, embedded[name])
            if isinstance(taken, RecordError):
                raise taken
            return taken
        with self._lock:
            if (stored := self._stored.get(name)) is not None:
                self._stored.move_to_end(name)
        if stored is None:
            stored = self._load(image)
            with self._lock:
                self._num_bytes += _size(stored) if name not in self._stored else 0
                self._stored[name] = stored
                while self._num_bytes > _CACHE_BYTES:
                    self._num_bytes -= _size(self._stored.popitem(last=False)[1])
        if isinstance(stored, RecordError):
            raise stored
        return stored

    def stamp(self, image: str | SlideRegion, embedded: Mapping[str, bytes] = _NONE) -> bytes:
        """Return size and time of an image's file, by which a change of it is noticed.

        Images of a bucket have none: to ask for it takes as long as to read them.
        """
        if self._bucket is not None or str(image) in embedded:
            return b""
        try:
            name = image.file if isinstance(image, SlideRegion) else image
            status = os.stat(os.path.join(self._images, name_of_any_ending(name, self._images)))
        except (OSError, ValueError):  # a record may name what is no file
            return b"-"
        return b"%d %d\n" % (status.st_size, status.st_mtime_ns)

    def _load(self, image: str | SlideRegion, data: bytes | None = None) -> StoredImage | RecordError:
        mpp = None
        try:
            if isinstance(image, SlideRegion):
                with self._slide(image.file) as path:
                    data, mpp = region_png(path, image, self._max_pixels), mpp_of(path, image.level)
            elif data is None:
                data = self._read(image)
            if self._resized is not None:
                from composer_path.images.pixels import ImagePreparation  # imports torch, which nothing else here needs

                if self._decode and is_jpeg(data):  # decoding alone doesn't find data that end early
                    check_image(data, self._max_pixels)
                data = ImagePreparation.of_square(Square.of(**self._resized), self._max_pixels).resize(data)
            elif not isinstance(image, SlideRegion):
                data = sanitize_image(data, self._max_pixels, decode=self._decode)
        except RecordError as error:
            return error
        return StoredImage(data, xxhash.xxh64_intdigest(data), mpp)

    def _read(self, name: str) -> bytes:
        if self._bucket is not None:
            return self._read_of_bucket(self._bucket, name)
        path = resolve_image(name, self._images)
        try:
            return path.read_bytes()
        except OSError as error:
            found = error.strerror or "a read error"
            raise RecordError("unreadable-image", found, "check the file's rights") from None

    def _read_of_bucket(self, bucket: Bucket, name: str) -> bytes:
        for one in names_of_any_ending(_name_in_bucket(name)):
            with suppress(FileNotFoundError):
                return bucket.read(one)
        raise _missing()

    @contextmanager
    def _slide(self, name: str) -> Iterator[Path]:
        """A slide as a file on a disk, for as long as it is read."""
        if self._bucket is None:
            yield resolve_image(name, self._images)
            return
        try:
            slide = _take_slide(self._images, _name_in_bucket(name))
        except FileNotFoundError:
            raise _missing() from None
        try:
            yield slide.path
        finally:
            _give_slide_back(slide)


def _size(stored: StoredImage | RecordError) -> int:
    return 1000 + (len(stored.data) if isinstance(stored, StoredImage) else 0)


def _missing() -> RecordError:
    return RecordError("missing-file", "no such file", "check the name and the image folder")


def _name_in_bucket(name: str) -> str:
    """Apply `resolve_image`'s rules where there are no links to follow."""
    check_name(name)
    return str(PurePosixPath(name))


@lru_cache(maxsize=1)
def _slide_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="composer_path_slides_")


@dataclass
class _FetchedSlide:
    """A slide of a bucket on this machine, and how many threads are reading it."""

    path: Path
    num_readers: int = 0


_slide_lock = threading.Lock()
_slides: OrderedDict[tuple[str, str], _FetchedSlide] = OrderedDict()


def _take_slide(images: str, name: str) -> _FetchedSlide:
    """Bring a slide of a bucket to the disk, where it stays at least until it is given back."""
    with _slide_lock:
        slide = _slides.get((images, name))
        if slide is None:
            hash = xxhash.xxh64_hexdigest(f"{images}\0{name}")
            slide = _FetchedSlide(Path(_slide_folder().name, hash + PurePosixPath(name).suffix))
            copy_to_disk(Bucket(images), name, slide.path)
            _slides[images, name] = slide
        _slides.move_to_end((images, name))
        slide.num_readers += 1
        return slide


def _give_slide_back(slide: _FetchedSlide) -> None:
    """Say that it has been read; of slides that nobody reads the last few are kept."""
    with _slide_lock:
        slide.num_readers -= 1
        unread = [key for key, fetched in _slides.items() if not fetched.num_readers]
        for key in unread[:-_NUM_KEPT_SLIDES]:
            _slides.pop(key).path.unlink(missing_ok=True)
