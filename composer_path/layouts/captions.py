"""Pictures with a text about each: caption lists (PMC-OA), Quilt-1M, ARCH, PathGen-1.6M and the reports of REG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import xxhash

from composer_path.images.folder import ANY_ENDING
from composer_path.layouts.row import CAPTION_KEYS, IMAGE_KEYS, Row, asked, untagged, wrong_type

# A side of PathGen-1.6M's regions, in pixels of level 0.
_PATHGEN_SIDE = 672
# The patient's part of a TCGA barcode: project, tissue source site, participant.
_TCGA_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=-|$)")


def captions(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{image, caption}`, in JSON or as columns."""
    return _about(row.about(), row.pictures(*IMAGE_KEYS) or [row.need(*IMAGE_KEYS)], row.text(*CAPTION_KEYS), prompts)


def quilt(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """A line of Quilt-1M's lookup table; the subset (openpath, pubmed, quilt, laion) becomes part of the source."""
    about = row.about(f"quilt-1m/{row.text('subset')}")
    return _about(about, [row.text("image_path")], row.text("caption"), prompts)


def arch(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{figure_id, letter, caption, uuid}`; the picture is `images/<uuid>` with any ending."""
    row.mark("figure_id", "letter")
    return _about(row.about("arch"), [f"images/{row.text('uuid')}{ANY_ENDING}"], row.text("caption"), prompts)


def pathgen(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{wsi_id, position: [x, y], caption}`: a square of 672 pixels at level 0 of `<wsi_id>.svs`."""
    slide, position = row.text("wsi_id"), row.need("position")
    if not isinstance(position, list) or len(position) != 2:
        raise wrong_type("position", "a list of x and y")
    x, y = (_whole_number(value) for value in position)
    file = slide if slide.lower().endswith(".svs") else f"{slide}.svs"
    region = {"file": file, "x": x, "y": y, "width": _PATHGEN_SIDE, "height": _PATHGEN_SIDE, "level": 0}
    about = {"slide": slide, **row.about("pathgen-1.6m")}
    if match := _TCGA_PATIENT.match(slide):
        about.setdefault("patient", match[0])
    return _about(about, [region], row.text("caption"), prompts)


def reg_report(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{id, report}`: the id is the picture's name."""
    return _about(row.about("reg"), [reg_picture(row)], row.text("report"), prompts)


def reg_picture(row: Row) -> str:
    """Return the picture of a row of REG: its id, with whatever ending the file has."""
    return re.sub(r"\.tiff?$", "", row.text("id"), flags=re.IGNORECASE) + ANY_ENDING


def _about(about: dict[str, Any], images: list[Any], text: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the record; of several prompts the text decides, so that a row always gets the same one."""
    prompt = prompts[xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) % len(prompts)]
    return {**about, **asked(images, prompt, untagged(text, "caption"))}


def _whole_number(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    raise wrong_type("position", "two whole numbers, as numbers or as strings")
