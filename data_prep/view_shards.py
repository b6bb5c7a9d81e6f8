"""Look into a set of shards, in a folder or a bucket: count, show, verify, and choose from it."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("composer_path") is None:  # run from a clone that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from composer_path.shards.view import ShardView, StoredSample

# Text of a record may hold anything; a terminal must not obey it.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="view_shards.py",
        description="Look into a set of shards, in a folder or a bucket. Only `show` prints what a record says.",
        epilog="Exit status: 0 all well, 1 problems or nothing done, 2 wrong arguments.",
    )
    parser.add_argument("shards", metavar="DIR_OR_URI", help="where index.json lies: a folder, s3://..., gs://...")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    summary = commands.add_parser("summary", help="the data card, and counts of sources, text lengths and image sizes")
    show = commands.add_parser("show", help="print one record WITH ITS TEXT and write its images as files")
    show.add_argument("which", metavar="ID|N", help="its position in the set, from 0, or its id as it is stored")
    show.add_argument("--id", action="store_true", help="take a number for an id, too")
    show.add_argument("--out", default=".", metavar="DIR", help="folder for the images (default: this one)")

    verify = commands.add_parser(
        "verify", help="every object, sample and image; exit status 1 and a list if one is bad"
    )
    verify.add_argument("--template", help="also check that every record has labels under this prompt template")
    verify.add_argument("--tokenizer", metavar="PATH", help="for --template: the language model's tokenizer")
    verify.add_argument("--max-seq-len", type=int, help="for --template: cut as training does (default: no cut)")
    verify.add_argument("--image-tokens", type=int, default=0, help="for --template: tokens of an image (default: 0)")
    verify.add_argument("--image-position", choices=("front", "inline"), default="front", help="for --template")

    choose = commands.add_parser("filter", help="write the records that fit all conditions as a new set")
    sample = commands.add_parser("sample", help="write N records drawn by chance as a new set")
    sample.add_argument("num_samples", metavar="N", type=int, help="how many")
    sample.add_argument("--seed", type=int, default=0, help="the same seed draws the same records (default: 0)")
    for command in (choose, sample):
        command.add_argument("--out", required=True, metavar="DIR_OR_URI", help="where to; nothing may lie there")
        command.add_argument(
            "conditions",
            nargs="+" if command is choose else "*",
            metavar="CONDITION",
            help="source=cmu, 'stain=H&E|IHC', organ!=colon, 'mpp<0.6', meta.site=A, images=1, 'turns>2'",
        )
    for command in (summary, verify, choose, sample):
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parsed, extra = parser.parse_known_args(arguments)
    if (extra and not hasattr(parsed, "conditions")) or any(word.startswith("-") for word in extra):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:  # argparse takes no conditions after an option if there were none before it
        parsed.conditions += extra
    if parsed.command == "verify" and (parsed.template is None) != (parsed.tokenizer is None):
        parser.error("--template and --tokenizer go together")
    if getattr(parsed, "workers", 1) < 1:
        parser.error("--workers must be at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse_arguments(arguments)
    # Only now: importing the streaming library takes seconds, and --help should not.
    from composer_path.shards.view import ShardView

    command = {"summary": summarize, "show": show, "verify": verify, "filter": choose, "sample": choose}
    try:
        return command[options.command](ShardView(options.shards), options)
    except (ValueError, OSError) as error:  # OSError: no space left, no right to write there, a store's refusal
        from composer_path.conversion.rejections import explained
        from composer_path.storage.places import shown

        print(explained(error, shown(getattr(options, "out", options.shards))), file=sys.stderr)
        return 1


def summarize(view: ShardView, options: argparse.Namespace) -> int:
    """Print the data card and what the shards hold."""
    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.shards.summary import summarize as count

    rows: list[tuple[str, Any]] = [("shards", len(view.shards))]
    rows.append(("MB", f"{sum(shard['raw_data']['bytes'] for shard in view.shards) / 1e6:.1f}"))
    rows += [(f"card: {key}", json.dumps(value)) for key, value in view.card.items() if key != "columns"]
    print("\n".join(f"{name:<36}{value}" for name, value in rows))
    print(count(view, options.workers, every_ten_seconds(len(view.shards), "shards read")))
    return 0


def show(view: ShardView, options: argparse.Namespace) -> int:
    """Print a record as text and write its images as files."""
    by_position = options.which.isdecimal() and not options.id
    sample = view.sample(int(options.which)) if by_position else view.find(options.which)
    rows: list[tuple[str, Any]] = [("position", sample.position), ("shard", sample.shard), ("id", sample.id)]
    rows += [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in sample.metadata.items()]
    rows += [(f"image {n}", path) for n, path in enumerate(write_images(sample, Path(options.out)), start=1)]
    lines = [f"{name:<16}{value}" for name, value in rows]
    conversation = sample.conversation
    turns = [("system", conversation.system)] if conversation.system is not None else []
    turns += [(turn.role, turn.text) for turn in conversation.turns]
    lines += [f"\n{role}:\n{text}" for role, text in turns]
    print("\n".join(lines).translate(_CONTROLS))
    return 0


def write_images(sample: StoredSample, folder: Path) -> list[Path]:
    """Write a sample's images as picture files; finished squares become PNG."""
    from composer_path.images.file import open_image
    from composer_path.images.square import is_square, square_of, unpack_square

    if sample.images:
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, data in enumerate(sample.images, start=1):
        if is_square(data):
            from PIL import Image

            pixels = unpack_square(data, square_of(data)).permute(1, 2, 0).contiguous().numpy()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            data = file.getvalue()
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(open_image(data).format or "", "bin")
        paths.append(folder / f"sample-{sample.position}-image-{number}.{suffix}")
        paths[-1].write_bytes(data)
    return paths


def verify(view: ShardView, options: argparse.Namespace) -> int:
    """Check the whole set and print what is wrong."""
    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.shards.check import LabelCounter, check_shards

    count_labels = None
    if options.template is not None:
        cut, position = (options.max_seq_len, options.image_tokens), options.image_position
        count_labels = LabelCounter(options.tokenizer, options.template, *cut, position)
    result = check_shards(view, options.workers, count_labels, every_ten_seconds(len(view.shards), "shards read"))
    print(result)
    return 1 if result.problems else 0


def choose(view: ShardView, options: argparse.Namespace) -> int:
    """Write a new set of the records that fit, or of some drawn by chance."""
    from composer_path.shards.select import Condition, select_samples

    conditions = [Condition.parse(text) for text in options.conditions]
    num_samples, seed = (options.num_samples, options.seed) if options.command == "sample" else (None, 0)
    print(select_samples(view, options.out, conditions, num_samples, seed, options.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
