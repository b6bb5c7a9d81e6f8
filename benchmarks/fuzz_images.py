"""Mutated images of many kinds: accepted with the same pixels, or refused by a named rule; never a crash or a hang.

python -m benchmarks.fuzz_images [--images 3000] [--seed 0]

Each is examined as a conversion does, in a process that may die. Of what is accepted the stored bytes are decoded and
compared with the pixels of the mutated file read directly.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.measure import write_result
from composer_path.images.examiner import Examiner
from composer_path.images.file import decode_pixels
from composer_path.parallel import ProcessKilled
from composer_path.records.rules import RULES, ImageError

MUTATIONS = ("flip", "byte", "cut", "drop", "repeat", "extreme", "none")
_EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\xff\xd9", b"\0\x10")


def kinds() -> dict[str, bytes]:
    """One whole file of each kind."""
    noise = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise).resize((61, 47), Image.Resampling.BICUBIC)
    grey, clear = rgb.convert("L"), rgb.copy()
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "JPEG 4:2:0": (rgb, "JPEG", {}),
        "JPEG 4:4:4": (rgb, "JPEG", {"subsampling": 0}),
        "JPEG progressive": (rgb, "JPEG", {"progressive": True}),
        "JPEG grey": (grey, "JPEG", {}),
        "JPEG CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "JPEG restarts": (rgb, "JPEG", {"restart_marker_blocks": 2}),
        "JPEG rotated": (rgb, "JPEG", {"exif": exif}),
        "JPEG RGB": (rgb, "JPEG", {"keep_rgb": True}),
        "PNG": (rgb, "PNG", {}),
        "PNG grey": (grey, "PNG", {}),
        "PNG 16 bits": (grey16, "PNG", {}),
        "PNG alpha": (clear, "PNG", {}),
        "PNG grey alpha": (clear.convert("LA"), "PNG", {}),
        "PNG palette": (rgb.quantize(32), "PNG", {}),
        "PNG palette alpha": (rgb.quantize(4), "PNG", {"transparency": b"\0\x40\x80\xff"}),
        "PNG two colours": (rgb.convert("1"), "PNG", {}),
        "PNG animated": (rgb, "PNG", frames),
        "PNG rotated, profile": (rgb, "PNG", {"exif": exif, "icc_profile": bytes(3000)}),
        "TIFF": (rgb, "TIFF", {}),
        "TIFF LZW": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "TIFF Deflate": (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "TIFF JPEG": (rgb, "TIFF", {"compression": "jpeg"}),
        "TIFF PackBits": (grey, "TIFF", {"compression": "packbits"}),
        "TIFF group 4": (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        "TIFF 16 bits": (grey16, "TIFF", {}),
        "TIFF CMYK": (rgb.convert("CMYK"), "TIFF", {}),
        "TIFF palette": (rgb.quantize(32), "TIFF", {}),
        "TIFF two pages": (rgb, "TIFF", frames),
        "BigTIFF": (rgb, "TIFF", {"big_tiff": True}),
        "WebP": (rgb, "WEBP", {}),
        "WebP lossless alpha": (clear, "WEBP", {"lossless": True}),
        "WebP animated": (rgb, "WEBP", frames),
        "BMP": (rgb, "BMP", {}),
        "BMP palette": (rgb.quantize(32), "BMP", {}),
        "GIF": (rgb.quantize(32), "GIF", {}),
        "GIF animated": (rgb, "GIF", frames),
        "JPEG 2000": (rgb, "JPEG2000", {}),
        "JPEG 2000 16 bits": (grey16, "JPEG2000", {}),
        "JPEG 2000 tiled": (rgb, "JPEG2000", {"tile_size": (32, 32)}),
    }
    files = {}
    for name, (image, kind, options) in made.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[name] = file.getvalue()
    return files


def mutated(data: bytes, mutation: str, noise: np.random.Generator) -> bytes:
    """The file with one fault; heads are hit as often as the rest."""
    size = len(data)
    place = int(noise.integers(0, min(size, 256) if noise.random() < 0.5 else size))
    length = int(noise.integers(1, 64))
    out = bytearray(data)
    if mutation == "flip":
        out[place] ^= 1 << int(noise.integers(8))
    elif mutation == "byte":
        for one in noise.integers(0, size, 3):
            out[one] = int(noise.integers(256))
    elif mutation == "cut":
        del out[place:]
    elif mutation == "drop":
        del out[place : place + length]
    elif mutation == "repeat":
        out[place:place] = out[place : place + length]
    elif mutation == "extreme":
        value = _EXTREMES[int(noise.integers(len(_EXTREMES)))]
        out[place : place + len(value)] = value
    return bytes(out)


def cases(number: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, mutation and bytes, kind after kind."""
    files, noise = kinds(), np.random.default_rng(seed)
    names = list(files)
    for index in range(number):
        name, mutation = names[index % len(names)], MUTATIONS[index // len(names) % len(MUTATIONS)]
        yield name, mutation, mutated(files[name], mutation, noise)


def outcome_of(data: bytes, examiner: Examiner) -> str:
    """`accepted`, the rule that refuses it, or what must not be."""
    try:
        stored = examiner.examine(data).data
    except ImageError as error:
        if "crashes its decoder" in error.found or "its decoder took" in error.found or "stood still" in error.found:
            return "decoder died"
        return error.rule if error.rule in RULES else "no rule"
    except ProcessKilled:
        return "killed"
    try:
        directly = decode_pixels(data)
    except ImageError:  # a whole JPEG without its end marker: read alone it isn't taken for one
        directly = decode_pixels(data + b"\xff\xd9")
    again = decode_pixels(stored)
    same = directly.mode == again.mode and np.array_equal(np.asarray(directly), np.asarray(again))
    return "accepted" if same else "other pixels"


def measure(number: int, seed: int) -> dict[str, Any]:
    """Outcomes by kind and mutation, and the most that the examining process held."""
    examiner, by_kind, by_mutation = Examiner(), dict[str, Counter[str]](), dict[str, Counter[str]]()
    slowest, peak, start = 0.0, 0, time.perf_counter()
    for kind, mutation, data in cases(number, seed):
        begun = time.perf_counter()
        outcome = outcome_of(data, examiner)
        slowest = max(slowest, time.perf_counter() - begun)
        by_kind.setdefault(kind, Counter())[outcome] += 1
        by_mutation.setdefault(mutation, Counter())[outcome] += 1
        peak = max(peak, *(child.memory_info().rss for child in psutil.Process().children()), 0)
    return {
        "settings": {"images": number, "seed": seed, "kinds": len(by_kind)},
        "outcomes": dict(sum(by_kind.values(), Counter[str]())),
        "by_kind": {kind: dict(found) for kind, found in by_kind.items()},
        "by_mutation": {mutation: dict(found) for mutation, found in by_mutation.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_seconds": round(slowest, 2),
        "peak_mb": round(peak / 1e6),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    result = measure(options.images, options.seed)
    print(result["outcomes"], result["slowest_seconds"], result["peak_mb"])
    print(write_result("fuzz_images", result))


if __name__ == "__main__":
    main()
