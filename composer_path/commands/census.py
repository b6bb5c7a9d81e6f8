"""Look at all records and pictures before they are converted: what is odd, what would be refused.

Prints a table; --html writes one page with histograms and small pictures, --json the figures. No text of a
conversation, file name or id is in any of them.

Exit code: 0 looked at (records may be refused), 1 it can't be read, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

from composer_path.commands.convert import add_options, options_given
from composer_path.commands.verb import add_import, add_workers, import_given
from composer_path.printable import printable_lines

# Of convert's options those that decide how records and pictures are read.
OPTIONS = (
    "layout",
    "caption_prompt",
    "where",
    "duplicate_ids",
    "image_tags",
    "scale_levels",
    "max_pixels",
    "image_memory",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is looked at, and where it is written."""
    add = parser.add_argument
    add("--data", required=True, help="records, as convert takes them")
    add("--images", required=True, help="folder or address of the images that the records name")
    add("--html", metavar="FILE", help="write a page")
    add("--json", metavar="FILE", help="write the figures")
    add_options(parser, OPTIONS)
    add("--yaml", metavar="YAML", help="a training's: count tokens, and what is cut at its max_seq_len")
    add("words", metavar="key=value", nargs="*", default=[], help="overrides of that YAML")
    add_import(parser)
    add_workers(parser)


def run(options: argparse.Namespace) -> int:
    """Look, print, write."""
    from composer_path.census.census import take_census
    from composer_path.census.page import page_of
    from composer_path.census.report import json_of, text_of_census
    from composer_path.conversion.options import ConvertOptions
    from composer_path.conversion.progress import ConvertProgress
    from composer_path.conversion.rejected_file import ConvertError
    from composer_path.storage.atomic import write_whole
    from composer_path.storage.errors import StorageError

    import_given(options)
    tokens = None
    if options.yaml is not None:
        from composer_path.planning.token_count import token_count

        tokens = token_count(options.yaml, options.words)
    elif options.words:
        raise ValueError(f"key=value: must belong to a YAML, found {options.words[0]!r} and no --yaml YAML")
    keywords = options_given(options, OPTIONS)
    ConvertOptions(**keywords)  # a wrong word is a mistake of the command, not of the input
    try:
        with closing(ConvertProgress(sys.stderr)) as progress:
            census = take_census(options.data, options.images, tokens=tokens, progress=progress, **keywords)
    except (ConvertError, StorageError) as error:
        print(printable_lines(str(error)), file=sys.stderr)
        return 1
    print(printable_lines(text_of_census(census)))
    page, figures = page_of(census), json.dumps(json_of(census), indent=2) + "\n"
    for path, text in ((options.html, page), (options.json, figures)):
        if path is not None:
            write_whole(Path(path), partial(_write, text.encode()))
            print(f"written: {path}")
    return 0


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)
