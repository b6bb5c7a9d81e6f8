"""Convert a JSON of conversations and its images to MDS shards; the work is in composer_path.conversion.convert."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if importlib.util.find_spec("composer_path") is None:  # run from a clone that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_EPILOG = """Exit status: 0 written, 1 nothing published because of the input or a place, 2 wrong arguments,
130 interrupted. 'convert.py merge OUT' publishes a data set that was converted with --part."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Check all records and images, list every problem together, and write MDS shards.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="JSON list or JSONL of {id, image, conversations: [{from, value}]}; a file or an address (s3://...)",
    )
    add("--images", required=True, help="folder or address of the images that the records name")
    add("--out", required=True, help="folder or address for the shards, empty or not there yet")
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="fail: write nothing if a record is bad; skip: write the good, list the bad (default: fail)",
    )
    add(
        "--ids",
        choices=("hash", "keep"),
        default="hash",
        help="hash: ids, patients, slides and file names become keyed hashes; keep: plainly (default: hash)",
    )
    add(
        "--check",
        choices=("full", "header"),
        default="full",
        help="full: decode every image once; header: only read its structure, faster, misses damaged pixels "
        "(default: full)",
    )
    add("--size-limit", default="64mb", help="size of a shard; 8 to 16 MB for small sets (default: 64mb)")
    add(
        "--max-pixels",
        type=int,
        help="refuse images with more pixels, unread (default: 268435456, 16384 x 16384)",
    )
    add(
        "--resize",
        metavar="SIDE",
        type=int,
        help="store finished squares of this many pixels a side instead of the files, so that training decodes nothing",
    )
    add("--fit", choices=("pad", "crop"), default="pad", help="how --resize makes them square (default: pad)")
    add(
        "--pad-color",
        metavar="R,G,B",
        help="0 to 255 each; of --resize --fit pad (default: the reference's mean colour, 123,116,103)",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: as many as cores)")
    add("--partition-size", type=int, help="records converted together (default: 256 to 8192, by number and kind)")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add("--overwrite", action="store_true", help="delete what an earlier conversion wrote to --out")
    add("--part", metavar="i/N", help="convert only the i-th of N parts; 'convert.py merge OUT' joins them")
    add("--engine", choices=("local", "spark"), default="local", help="who converts the partitions (default: local)")
    add("--master", help="address of Spark, such as spark://host:7077 (default: what spark-submit or its files say)")
    add(
        "--rejected",
        metavar="FILE",
        help="list what is wrong with each record here, ids included (default: rejected.jsonl beside the "
        "data with --on-error skip, nowhere with fail)",
    )
    add(
        "--key",
        metavar="FILE",
        help="secret key of the hashes, made if it isn't there; the mapping from hashes to values is written "
        "beside it (default: identifiers.key beside the data)",
    )
    options = parser.parse_args(arguments)
    try:
        options.pad_color = [int(value) for value in (options.pad_color or "123,116,103").split(",")]
    except ValueError:
        options.pad_color = []
    if len(options.pad_color) != 3 or not all(0 <= value <= 255 for value in options.pad_color):
        parser.error("argument --pad-color: must be three numbers from 0 to 255, such as 123,116,103")
    return options


def parse_merge_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of ``merge``; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="convert.py merge", description="Check that all parts are there and whole, and write the index."
    )
    parser.add_argument("out", help="folder or address that the parts were written to")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="files read at once")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    merging = list(arguments[:1]) == ["merge"]
    options = parse_merge_arguments(arguments[1:]) if merging else parse_arguments(arguments)
    # Only now: --help should come at once.
    from composer_path.conversion.convert import convert, merge
    from composer_path.conversion.progress import ConvertProgress
    from composer_path.conversion.rejections import ConvertError, explained
    from composer_path.images.file import MAX_PIXELS
    from composer_path.storage.places import StorageError, shown

    progress = ConvertProgress(sys.stderr)
    try:
        if merging:
            summary = merge(options.out, workers=options.workers, progress=progress)
        else:
            summary = convert(
                options.data,
                options.images,
                options.out,
                on_error=options.on_error,
                ids=options.ids,
                size_limit=options.size_limit,
                max_pixels=MAX_PIXELS if options.max_pixels is None else options.max_pixels,
                check=options.check,
                resized=resized_of(options),
                rejected=options.rejected,
                key=options.key,
                workers=options.workers,
                partition_size=options.partition_size,
                resume=options.resume,
                overwrite=options.overwrite,
                part=options.part,
                engine=options.engine,
                master=options.master,
                progress=progress,
            )
    except (ConvertError, StorageError, ImportError) as error:
        progress.close()
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # no space left, no right to write
        progress.close()
        print(f"{explained(error, shown(options.out))}; then the same command with --resume goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    progress.close()
    print(summary)
    return 0


def resized_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return how finished squares are made, None without --resize."""
    if options.resize is None:
        return None
    pad_color = options.pad_color if options.fit == "pad" else None
    return {"image_size": options.resize, "fit": options.fit, "pad_color": pad_color}


if __name__ == "__main__":
    sys.exit(main())
