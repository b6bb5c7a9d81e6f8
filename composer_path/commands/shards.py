"""Look into a set of shards, in a folder or a bucket: summary, show, verify, filter, sample.

Only `show` prints what a record says. Exit code 1: `verify` found problems.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from composer_path.commands.verb import add_workers
from composer_path.printable import printable_lines

if TYPE_CHECKING:
    from composer_path.shards.view import ShardView, StoredSample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, and what to do with it."""
    parser.add_argument("shards", metavar="DIR_OR_URI", help="where index.json lies: a folder, s3://..., gs://...")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    summary = actions.add_parser("summary", help="the data card, and counts of sources, text lengths and image sizes")

    showing = actions.add_parser("show", help="print one record WITH ITS TEXT and write its images as files")
    showing.add_argument("which", metavar="ID|N", help="its position in the set, from 0, or its id as it is stored")
    showing.add_argument("--id", action="store_true", help="take a number for an id, too")
    showing.add_argument("--out", default=".", metavar="DIR", help="folder for the images (default: this one)")

    verifying = actions.add_parser("verify", help="every object, sample and image; a list of what is bad")
    verifying.add_argument("--template", help="also check that every record has labels under this prompt template")
    verifying.add_argument("--tokenizer", metavar="PATH", help="for --template: the language model's tokenizer")
    verifying.add_argument("--max-seq-len", type=int, help="for --template: cut as training does (default: no cut)")
    verifying.add_argument("--image-tokens", type=int, default=1, help="for --template: of an image (default: 1)")
    verifying.add_argument("--image-position", choices=("front", "inline"), default="front", help="for --template")

    choosing = actions.add_parser("filter", help="write the records that fit all conditions as a new set")
    choosing.set_defaults(num_samples=None, seed=0)
    drawing = actions.add_parser("sample", help="write N records drawn by chance as a new set")
    drawing.add_argument("num_samples", metavar="N", type=int, help="how many")
    drawing.add_argument("--seed", type=int, default=0, help="the same seed draws the same records (default: 0)")
    conditions = "source=cmu, 'stain=H&E|IHC', organ!=colon, 'mpp<0.6', meta.site=A, images=1, 'turns>2'"
    for choice in (choosing, drawing):
        choice.add_argument("--out", required=True, metavar="DIR_OR_URI", help="where to; nothing may lie there")
        choice.add_argument("words", nargs="+" if choice is choosing else "*", metavar="CONDITION", help=conditions)
    for action in (summary, verifying, choosing, drawing):
        add_workers(action)


def run(options: argparse.Namespace) -> int:
    """Do it."""
    if options.action == "verify" and (options.template is None) != (options.tokenizer is None):
        raise ValueError("--template and --tokenizer go together; give both or none")

    from composer_path.shards.view import ShardView

    action = {"summary": summarize, "show": show, "verify": verify, "filter": choose, "sample": choose}
    return action[options.action](ShardView(options.shards), options)


def summarize(view: ShardView, options: argparse.Namespace) -> int:
    """Print the data card and what the shards hold."""
    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.shards.summary import summarize as count

    megabytes = sum(shard["raw_data"]["bytes"] for shard in view.shards) / 1e6
    rows: dict[str, object] = {"shards": len(view.shards), "MB": f"{megabytes:.1f}"}
    rows |= {f"card: {key}": json.dumps(value) for key, value in view.card.items() if key != "columns"}
    print(printable_lines("\n".join(f"{name:<36}{value}" for name, value in rows.items())))
    print(count(view, options.workers, every_ten_seconds(len(view.shards), "shards read")))
    return 0


def show(view: ShardView, options: argparse.Namespace) -> int:
    """Print a record as text and write its images as files."""
    by_position = options.which.isdecimal() and not options.id
    sample = view.sample(int(options.which)) if by_position else view.find(options.which)
    rows = {"position": sample.position, "shard": sample.shard, "id": sample.id, **sample.metadata}
    rows |= {f"image {n}": str(path) for n, path in enumerate(write_images(sample, Path(options.out)), start=1)}
    lines = [f"{name:<16}{value if isinstance(value, str) else json.dumps(value)}" for name, value in rows.items()]
    system, turns = sample.conversation.system, sample.conversation.turns
    lines += [] if system is None else [f"\nsystem:\n{system}"]
    lines += [f"\n{turn.role}{_weight(turn.weight)}:\n{turn.text}" for turn in turns]
    print(printable_lines("\n".join(lines)))  # text of a record may hold anything
    return 0


def _weight(weight: float) -> str:
    return "" if weight == 1 else f" (weight {weight:g} in the loss)"


def write_images(sample: StoredSample, folder: Path) -> list[Path]:
    """Write a sample's images as picture files; finished squares become PNG."""
    from PIL import Image

    from composer_path.images.file import open_image
    from composer_path.images.stored_square import is_square, square_of, unpack_square

    paths = []
    for number, data in enumerate(sample.images, start=1):
        kind = "PNG" if is_square(data) else open_image(data).format or ""
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(kind, "bin")
        paths.append(folder / f"sample-{sample.position}-image-{number}.{suffix}")
        folder.mkdir(parents=True, exist_ok=True)
        if is_square(data):
            pixels = unpack_square(data, square_of(data)).transpose(1, 2, 0)
            Image.fromarray(pixels).save(paths[-1])
        else:
            paths[-1].write_bytes(data)
    return paths


def verify(view: ShardView, options: argparse.Namespace) -> int:
    """Check the whole set and print what is wrong."""
    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.shards.check import LabelCounter, check_shards

    count_labels = None
    if options.template is not None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would not survive a fork
        from composer_path.records.prompts import get_template
        from composer_path.records.strict_json import decode_json
        from composer_path.records.tokenize import TextPreparation
        from composer_path.records.vocabulary import load_tokenizer, text_encoder

        named = options.template
        named = decode_json(named.encode()) if named.lstrip().startswith("{") else named
        settings = options.image_tokens, options.max_seq_len, options.image_position
        text = TextPreparation(get_template(named), *settings)
        count_labels = LabelCounter(text_encoder(load_tokenizer(options.tokenizer)), text)
    result = check_shards(view, options.workers, count_labels, every_ten_seconds(len(view.shards), "shards read"))
    print(result)
    return 1 if result.problems else 0


def choose(view: ShardView, options: argparse.Namespace) -> int:
    """Write a new set of the records that fit, or of some drawn by chance."""
    from composer_path.shards.select import Condition, select_samples

    conditions = [Condition.parse(text) for text in options.words]
    print(select_samples(view, options.out, conditions, options.num_samples, options.seed, options.workers))
    return 0
