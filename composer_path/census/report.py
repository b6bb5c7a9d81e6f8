"""What a census says: as text for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from composer_path.census.census import Census
from composer_path.census.tally import HISTOGRAMS
from composer_path.conversion.partition import KEY_COUNTS
from composer_path.conversion.record_file import place_of
from composer_path.images.plain_pixels import ODDITIES

_KINDS = {"answers": "answers", "conversations": "records (text and names of pictures)", "pictures": "pictures"}


def rows_of(census: Census) -> Iterator[tuple[str, str]]:
    """Figures and what they are of; those about oddities only where there are any."""
    tally, tokens = census.tally, census.tokens
    yield "records", f"{tally.records:,}"
    if tally.refused:
        yield "would be refused", f"{tally.refused:,}"
    for rule, count in tally.rules.most_common():
        yield f"  {rule}", f"{count:,}"
    yield "pictures", f"{tally.images:,} ({tally.image_bytes / 1e6:,.1f} MB as stored)"
    yield "records without a picture", f"{tally.without_image:,}"
    for name, count in tally.oddities.items():
        yield f"  {ODDITIES[name]}", f"{count:,}"
    if census.duplicate_ids:
        yield "ids given before", f"{census.duplicate_ids:,}"
    for kind, repetition in census.repetitions.items():
        if repetition.num_repeated:
            yield f"repeated {_KINDS[kind]}", f"{repetition.num_repeated:,}"
    if tokens is not None:
        limit = "no limit" if tokens.max_seq_len is None else f"{tokens.max_seq_len:,} tokens"
        yield f"cut at {limit} ({tokens.where})", f"{tally.truncated:,}"
        yield "  with no answer left", f"{tally.unusable:,}"
    for name, words in KEY_COUNTS.items():
        for key, count in tally.keys[name].most_common():
            yield f"{words} {key}", f"in {count:,} records"
    for why, count in tally.left_out.items():
        yield f"left out by {why}", f"{count:,} rows"
    for layout, count in tally.layouts.most_common():
        yield f"layout {layout or '(none fits)'}", f"{count:,} records"
    for source, counts in sorted(tally.sources.items(), key=lambda item: -item[1]["records"]):
        refused = f", {counts['refused']:,} refused" if counts["refused"] else ""
        yield f"source {source or '(none)'}", f"{counts['records']:,} records, {counts['images']:,} pictures{refused}"


def text_of_census(census: Census) -> str:
    """A table, then what comes most often and the first problems."""
    lines = [f"{name:<58}{value}" for name, value in rows_of(census)]
    for kind, repetition in census.repetitions.items():
        for one in repetition.most[:3]:
            what = f"{one.size:,} {'bytes' if kind == 'pictures' else 'characters'}"
            lines.append(
                f"most repeated of the {kind}: {one.times:,} times, {what}, first in {place_of(one.first, None)}"
            )
    if census.rejections:
        lines.append(str(census.rejections))
    return "\n".join(lines)


def json_of(census: Census) -> dict[str, Any]:
    """The same for programs; histograms by the lower end of each bin."""
    tally = census.tally
    plain = ("records", "refused", "without_image", "images", "image_bytes", "truncated", "unusable")
    return {
        "file": {"name": census.name, "bytes": census.bytes},
        **{name: getattr(tally, name) for name in plain},
        "rules": dict(tally.rules.most_common()),
        "duplicate_ids": census.duplicate_ids,
        "repeated": {
            kind: {"repeated": one.num_repeated, "most": [vars(repeated) for repeated in one.most]}
            for kind, one in census.repetitions.items()
        },
        "layouts": dict(tally.layouts.most_common()),
        "sources": {source: dict(counts) for source, counts in sorted(tally.sources.items())},
        "oddities": dict(tally.oddities),
        "left_out": dict(tally.left_out),
        **{name: dict(counts.most_common()) for name, counts in tally.keys.items()},
        "histograms": {
            name: {"of": HISTOGRAMS[name], "bins": {str(low): counts[low] for low in sorted(counts)}}
            for name, counts in tally.histograms.items()
            if counts
        },
    }
