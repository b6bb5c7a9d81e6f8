"""Convert a JSON of conversations and its images to MDS shards; the work is in composer_path.data.shards."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if importlib.util.find_spec("composer_path") is None:  # run from a clone that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Check all records and images, list every problem together, and write MDS shards.",
        epilog="Exit status: 0 written, 1 nothing written because of the input, 2 wrong arguments.",
    )
    parser.add_argument(
        "--data", required=True, help="JSON list or JSONL of {id, image, conversations: [{from, value}]}"
    )
    parser.add_argument("--images", required=True, help="folder of the images that the records name")
    parser.add_argument(
        "--out", required=True, help="folder for the shards, empty or not there yet, or a URI (s3://...)"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="fail: write nothing if a record is bad; skip: write the good, list the bad (default: fail)",
    )
    parser.add_argument(
        "--ids",
        choices=("hash", "keep"),
        default="hash",
        help="hash: ids, patients, slides and file names become keyed hashes; keep: plainly (default: hash)",
    )
    parser.add_argument("--size-limit", default="64mb", help="size of a shard (default: 64mb)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        help="refuse images with more pixels, unread (default: 268435456, 16384 x 16384)",
    )
    parser.add_argument(
        "--rejected",
        metavar="FILE",
        help="list what is wrong with each record here, ids included (default: rejected.jsonl beside the "
        "data with --on-error skip, nowhere with fail)",
    )
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="secret key of the hashes, made if it isn't there; the mapping from hashes to values is written "
        "beside it (default: identifiers.key beside the data)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse_arguments(arguments)
    # Only now: importing the streaming library takes seconds, and --help should not.
    from composer_path.data.rejections import ConvertError
    from composer_path.data.shards import MAX_PIXELS, convert

    try:
        summary = convert(
            options.data,
            options.images,
            options.out,
            on_error=options.on_error,
            ids=options.ids,
            size_limit=options.size_limit,
            max_pixels=MAX_PIXELS if options.max_pixels is None else options.max_pixels,
            rejected=options.rejected,
            key=options.key,
            progress=every_ten_seconds(),
        )
    except (ConvertError, OSError) as error:  # OSError: no space left, no right to write there
        print(error, file=sys.stderr)
        return 1
    print(summary)
    return 0


def every_ten_seconds() -> Callable[[str, int], None]:
    """Make a progress report that prints at most once in ten seconds; short conversions stay silent."""
    last = time.monotonic()

    def report(done: str, count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{count} records {done}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
