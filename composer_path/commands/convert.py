"""Check records and images, list every problem together, and write MDS shards.

Exit code: 0 written, 1 nothing published because of the input or a place, 2 wrong arguments, 130 interrupted.
`merge` publishes a set that was converted with --part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from composer_path.commands.verb import add_import, add_workers, import_given
from composer_path.printable import printable_lines

if TYPE_CHECKING:
    from composer_path.conversion.convert import Progress
    from composer_path.conversion.sample_lengths import WantedLengths
    from composer_path.conversion.summary import ConvertSummary

# What each option does; its name, choices and default are those of the conversion's own.
OPTIONS = {
    "on_error": "fail: write nothing if a record is bad; skip: write the good, list the bad",
    "ids": "hash: ids, patients, slides and file names become keyed hashes; keep: plainly",
    "duplicate_ids": "of records that share an id: refuse the later ones, or keep all, theirs with a suffix",
    "image_tags": "<IMAGE>, <image_1>, <img> and the like in questions: refuse them, or read them as <image>",
    "check": "full: decode every image once; header: only read its structure, faster, misses damaged pixels",
    "size_limit": "size of a shard; 8mb to 16mb for small sets",
    "max_pixels": "refuse images with more pixels, unread",
    "image_memory": "bound of the memory that images take while they are decoded, all workers together",
    "scale_levels": "take 16-bit grey whose levels stay below 4,096 for 12 bits, and scale it",
    "partition_size": "records converted together (default: 256 to 8192, by number and kind)",
    "layout": "how the records are written down (docs/data.md, Layouts): auto looks at their keys",
    "caption_prompt": "question for sets that have only captions; give it several times to vary it",
    "where": "take rows with [TABLE.csv:]COLUMN=VALUE only (= != < <= > >=, | between values); may be given several "
    "times; a table is joined by the pictures' names, such as predictions_quiltcleaner.csv:any_impairment=0",
    "resume": "go on where the same command was interrupted",
    "overwrite": "delete what an earlier conversion wrote to --out",
    "part": "i/N: convert only the i-th of N parts; `merge` joins them",
    "engine": "who converts the partitions",
    "master": "address of Spark, such as spark://host:7077 (default: what spark-submit or its files say)",
    "rejected": "file that lists what is wrong with each record, ids included (default: rejected.jsonl beside the data "
    "with --on-error skip, none with fail)",
    "key": "file of the hashes' secret key, made if it isn't there; the mapping from hashes to values is written "
    "beside it (default: identifiers.key beside the data)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is converted, where to, and how."""
    add = parser.add_argument
    records = "records as a JSON list, JSONL, CSV, TSV or parquet; a file or an address (s3://...)"
    add("--data", required=True, help=records)
    add("--images", required=True, help="folder or address of the images that the records name")
    add("--out", required=True, help="folder or address for the shards, empty or not there yet")
    add_options(parser, OPTIONS)
    add_import(parser)
    add_workers(parser)
    squares = "store finished squares of this many pixels a side, so that training decodes nothing"
    add("--resize", metavar="SIDE", type=int, help=squares)
    add("--fit", choices=("pad", "crop"), default="pad", help="how --resize makes them square (default: pad)")
    what = "YAML of the training that reads --out: count its samples' lengths, for train_loader.balance, on the way"
    add("--lengths", metavar="YAML", help=what)
    add("words", metavar="key=value", nargs="*", default=[], help="overrides of that YAML")
    mean = "of --resize --fit pad, 0 to 255 each (default: the reference's mean colour, %(default)s)"
    add("--pad-color", metavar="R,G,B", type=color, default="123,116,103", help=mean)


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Those of `OPTIONS` of these names."""
    from composer_path.conversion import options

    add = parser.add_argument
    known = {field.name: field for field in fields(options.ConvertOptions)}
    for name in names:
        purpose = OPTIONS[name]
        flag, kind, default = f"--{name.replace('_', '-')}", str(known[name].type), known[name].default
        if kind == "bool":
            add(flag, action="store_true", help=purpose)
            continue
        if kind == "Sequence[str]":
            add(flag, action="append", help=f"{purpose}{_default_of(default)}", metavar="X")
            continue
        choices = get_args(getattr(options, kind, None)) or None  # of a Literal with a name
        number = int if kind in ("int", "int | None") else str
        shown = purpose if default is None else f"{purpose} (default: %(default)s)"
        add(flag, type=number, choices=choices, default=default, help=shown, metavar=None if choices else "X")


def options_given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Keywords of `ConvertOptions`; of lists that weren't given the default stays."""
    given = {name: getattr(options, name) for name in ("workers", *names)}
    return {name: value for name, value in given.items() if value is not None}


def color(text: str) -> list[int]:
    """Three numbers of a byte each."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise argparse.ArgumentTypeError("must be three numbers from 0 to 255, such as 123,116,103")
    return [int(part) for part in parts]


def _default_of(texts: Any) -> str:
    return f" (default: {', '.join(texts)})" if texts else ""


def run(options: argparse.Namespace) -> int:
    """Convert."""
    from composer_path.conversion.options import ConvertOptions

    keywords = options_given(options, OPTIONS)
    if options.resize is not None:
        pad_color = options.pad_color if options.fit == "pad" else None
        keywords["resized"] = {"image_size": options.resize, "fit": options.fit, "pad_color": pad_color}
    import_given(options)
    ConvertOptions(**keywords)  # a wrong word is a mistake of the command, not of the input

    if options.lengths is not None:
        keywords["lengths"] = wanted_lengths(options)
        import_given(options)  # beside those of the YAML
    elif options.words:
        raise ValueError(f"key=value: must belong to a YAML, found {options.words[0]!r} and no --lengths YAML")

    from composer_path.conversion.convert import convert

    places = (options.data, options.images, options.out)
    overwrite = bool(keywords.get("overwrite"))
    return convert_and_report(lambda progress: convert(*places, progress=progress, **keywords), options.out, overwrite)


def wanted_lengths(options: argparse.Namespace) -> list[WantedLengths]:
    """What is to be counted for the training of a YAML."""
    from composer_path.config.reading import load_config, plain

    allowed: list[str] | None = [] if options.no_imports else None
    settings = plain(load_config(options.lengths, options.words, allowed_imports=allowed))

    from composer_path.planning.measured_lengths import wanted_lengths

    return wanted_lengths(settings, options.out)


def convert_and_report(work: Callable[[Progress], ConvertSummary], out: str, overwrite: bool = False) -> int:
    """Convert or merge, print what came of it, and return the exit code."""
    from composer_path.conversion.progress import ConvertProgress
    from composer_path.conversion.rejected_file import ConvertError, explained
    from composer_path.storage.errors import StorageError, shown

    again = f"the same command with --resume{' in place of --overwrite' if overwrite else ''} goes on"
    try:
        with closing(ConvertProgress(sys.stderr)) as progress:
            summary = work(progress)
    except (ConvertError, StorageError, ImportError) as error:
        print(printable_lines(str(error)), file=sys.stderr)
        return 1
    except OSError as error:  # no space left, no right to write
        said = f"{explained(error, shown(out))}; then {again}"
        print(printable_lines(said), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    print(printable_lines(str(summary)))
    return 0
