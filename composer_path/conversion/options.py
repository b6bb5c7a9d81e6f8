"""How a conversion is to be done: its options, checked before the first record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, no_type_check

from composer_path.conversion.rejected_file import ConvertError
from composer_path.images.file import MAX_PIXELS
from composer_path.images.memory import IMAGE_MEMORY, memory_bytes
from composer_path.layouts.condition import ConditionError
from composer_path.layouts.own import own_layouts
from composer_path.layouts.reading import CAPTION_PROMPT, Reading
from composer_path.layouts.registry import LAYOUT_NAMES, SET_NAMES
from composer_path.records.rules import IMAGE_TAG
from composer_path.shards.mds import HASHES

OnError = Literal["fail", "skip"]
Ids = Literal["hash", "keep"]
Check = Literal["full", "header"]
Engine = Literal["local", "spark"]
DuplicateIds = Literal["refuse", "keep"]
ImageTags = Literal["refuse", "read"]

_CHOICES = {"on_error": OnError, "ids": Ids, "check": Check, "engine": Engine}
_CHOICES |= {"duplicate_ids": DuplicateIds, "image_tags": ImageTags}
_UNITS = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


@no_type_check  # a wrong word gets an error of its own, also where types are checked as the tests do
@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion; a `ConvertError` says that one is wrong, or that two don't go together.

    Attributes:
        on_error: `fail` writes nothing if any record breaks a rule; `skip` writes the good ones and lists the others.
        ids: `hash` stores keyed hashes of identifying values, `keep` stores them plainly.
        duplicate_ids: `refuse` takes the second record of an id for a mistake; `keep` keeps it, its id with a suffix.
        image_tags: `read` takes `<IMAGE>`, `<image_1>`, `<img>` and the like in questions for `<image>`, `refuse` names
            them.
        size_limit: Size of a shard, as a text with its unit or in bytes; 64 MB is read well from a disk and from an
            object store.
        hashes: Checksums kept in the index; xxh64 is the cheapest.
        max_pixels: Images with more pixels than this are refused unread (decompression bombs).
        image_memory: Bound of the memory that images take while they are examined, all workers together, with its unit;
            one image may take half of it.
        scale_levels: 16-bit grey whose levels stay below 4,096 is taken for 12 bits, and scaled.
        check: `full` decodes every image once; `header` reads its structure only, and misses damaged pixels.
        resized: `{image_size, fit, pad_color}` stores finished squares in place of the files.
        rejected: Where to list what is wrong with each record, with its id: by default `rejected.jsonl` beside the
            input if `on_error` is `skip`, and nowhere if it is `fail`.
        key: Secret key of the hashes, made if it isn't there: by default `identifiers.key` beside the input, so that
            all data sets of one folder share it. The mapping back is written beside the key.
        workers: Processes.
        partition_size: Records that are converted together; by default 256 to 8192, by number and kind.
        resume: Go on where the same command was interrupted.
        overwrite: Delete what an earlier conversion has written to the same place.
        part: `2/8` converts the second eighth; `merge` publishes when all are there.
        layout: How the records are written down, a name of `LAYOUTS` or of a public set; `auto` looks at their keys.
        caption_prompt: The question where a set has only captions; of several the caption decides which.
        where: Conditions that a row must keep (`subset=openpath`, `table.csv:column=0`); others are left out, counted.
        engine: `local`, or `spark` to have Spark's executors convert the partitions.
        master: Spark's address, for example `spark://host:7077` or `local[4]`.
    """

    on_error: OnError = "fail"
    ids: Ids = "hash"
    duplicate_ids: DuplicateIds = "refuse"
    image_tags: ImageTags = "refuse"
    size_limit: int | str = "64mb"
    hashes: Sequence[str] = ("xxh64",)
    max_pixels: int = MAX_PIXELS
    image_memory: str = IMAGE_MEMORY
    scale_levels: bool = False
    check: Check = "full"
    resized: Mapping[str, Any] | None = None
    rejected: str | Path | None = None
    key: str | Path | None = None
    workers: int = 1
    partition_size: int | None = None
    resume: bool = False
    overwrite: bool = False
    part: str | None = None
    layout: str = "auto"
    caption_prompt: Sequence[str] = (CAPTION_PROMPT,)
    where: Sequence[str] = ()
    engine: Engine = "local"
    master: str | None = None

    def __post_init__(self) -> None:
        for name, choice in _CHOICES.items():
            known, value = get_args(choice), getattr(self, name)
            if value not in known:
                raise ConvertError(f"--{name.replace('_', '-')}: must be {known[0]!r} or {known[1]!r}, found {value!r}")
        if unknown := [name for name in self.hashes if name not in HASHES]:
            raise ConvertError(f"hashes: must be checksums such as xxh64 or sha256, found {unknown}")
        for option, number in (
            ("--workers", self.workers),
            ("--partition-size", self.partition_size),
            ("--max-pixels", self.max_pixels),
        ):
            if number is not None and number < 1:
                raise ConvertError(f"{option}: must be 1 or more, found {number}")
        try:
            memory_bytes(self.image_memory)
        except ValueError as error:
            raise ConvertError(f"--image-memory: {error}") from None
        if self.scale_levels and self.check == "header":
            raise ConvertError("--scale-levels and --check header: must not both be given; levels must be decoded")
        if self.resized is not None and not 1 <= self.resized["image_size"] <= 65535:
            raise ConvertError(f"--resize: must be 1 to 65535 pixels, found {self.resized['image_size']}")
        if self.resume and self.overwrite:
            raise ConvertError("--resume and --overwrite: must not both be given; one keeps what the other deletes")
        if self.overwrite and self.num_parts > 1:
            raise ConvertError("--overwrite: must not be given for a part; it would delete the others: empty the place")
        if self.layout in own_layouts() and self.engine != "local":
            raise ConvertError(f"--layout: can't be one's own with --engine {self.engine}, which hasn't its code")
        if SET_NAMES.get(self.layout, self.layout) not in (*LAYOUT_NAMES, *own_layouts()):
            names = ", ".join((*LAYOUT_NAMES, *SET_NAMES, *own_layouts()))
            raise ConvertError(f"--layout: must be one of {names}; found {self.layout!r}")
        if not self.caption_prompt or not all(text.strip() and IMAGE_TAG not in text for text in self.caption_prompt):
            raise ConvertError(f"--caption-prompt: must be a question without {IMAGE_TAG}, found none, or a tag")
        try:
            _ = self.reading.fingerprint()  # reads the tables, too
        except ConditionError as error:
            raise ConvertError(str(error)) from None
        _ = self.size_bytes, self.part_number

    @property
    def reading(self) -> Reading:
        """How the file's rows become records."""
        return Reading(SET_NAMES.get(self.layout, self.layout), tuple(self.caption_prompt), tuple(self.where))

    @property
    def size_bytes(self) -> int:
        """Size of a shard in bytes; "64mb" is 64 * 1024 * 1024, as in streaming."""
        given = self.size_limit
        size = given if isinstance(given, int) else 0
        if isinstance(given, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", given.strip().lower())):
            if not match[2]:
                raise ConvertError(f"--size-limit: must have a unit, found {given!r}; give one, as in 64mb")
            size = int(float(match[1]) * _UNITS.get(match[2], 0))
        if not 0 < size < 2**32:
            raise ConvertError(f"--size-limit: must be a size below 4 GB such as 64mb, found {given!r}")
        return size

    @property
    def part_number(self) -> int:
        """Number of the part, from 1."""
        return self._part[0]

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return self._part[1]

    @property
    def _part(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part or "1/1")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConvertError(f"--part: must be i/N with i from 1 to N, such as 2/8, found {self.part!r}")
        return int(match[1]), int(match[2])

    def shaping(self, partition_size: int) -> dict[str, Any]:
        """Return those that shape the shards, as the data card holds them."""
        names = (
            "ids",
            "duplicate_ids",
            "image_tags",
            "size_limit",
            "hashes",
            "max_pixels",
            "scale_levels",
            "check",
            "resized",
            "on_error",
        )
        shaping = {name: getattr(self, name) for name in names}
        shaping |= self.reading.fingerprint()
        return shaping | {"hashes": sorted(self.hashes), "partition_size": partition_size}
