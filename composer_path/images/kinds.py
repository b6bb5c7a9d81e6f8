"""What a file that is none of the readable images is, by its first bytes: said so that somebody can mend it."""

from __future__ import annotations

import re

from composer_path.records.rules import ImageError

_EXPORT = "export it as PNG"
_FETCH = "fetch the picture itself"
_REGION = "name a region of it with x, y, width and height, or export it as PNG"

# What a file is, and what to do; found by the bytes at its start. Pictures of a kind that isn't read.
_PICTURES: tuple[tuple[bytes, str, str], ...] = (
    (b"8BPS", "a Photoshop file", _EXPORT),
    (b"%PDF", "a PDF file", "export its picture as PNG"),
    (b"%!PS", "a PostScript file", "export its picture as PNG"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file", "export its picture as PNG"),
    (b"\xff\x0a", "a JPEG XL file", _EXPORT),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file", _EXPORT),
    (b"II\xbc\x01", "a JPEG XR file", _EXPORT),
    (b"\x76\x2f\x31\x01", "an OpenEXR file", _EXPORT),
    (b"\0\0\1\0", "an icon file", _EXPORT),
    (b"\x8aMNG\r\n\x1a\n", "an MNG file", _EXPORT),
    (b"\x8bJNG\r\n\x1a\n", "a JNG file", _EXPORT),
    (b"ZISRAWFILE", "a Zeiss CZI file", _REGION),
    (b"SIMPLE  =", "a FITS file", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (b"gimp xcf", "a GIMP file", _EXPORT),
    (b"qoif", "a QOI file", _EXPORT),
    (b"DDS ", "a DDS file", _EXPORT),
    (b"icns", "an Apple icon file", _EXPORT),
    (b"\x01\xda\x00", "an SGI file", _EXPORT),
    (b"\x01\xda\x01", "an SGI file", _EXPORT),
    (b"\x0a\x05\x01", "a PCX file", _EXPORT),
    (b"#?RADIANCE", "a Radiance file", _EXPORT),
    (b"BPG\xfb", "a BPG file", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "an Office or FlashPix file", "export its picture as PNG"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
)
# What was saved in place of a picture; asked in lower case, after blanks.
_TEXTS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer in place of the picture", "run `git lfs pull`"),
    (b"version https://hawser", "a Git LFS pointer in place of the picture", "run `git lfs pull`"),
    (b"/annex/objects", "a git-annex pointer in place of the picture", "run `git annex get`"),
    (b"<!doctype html", "an HTML page in place of the picture", _FETCH),
    (b"<html", "an HTML page in place of the picture", _FETCH),
    (b"<error", "a server's error message in place of the picture", _FETCH),
    (b"data:image/", "a data URL in place of the picture", "decode it into a file"),
    (b"http://", "an address in place of the picture", _FETCH),
    (b"https://", "an address in place of the picture", _FETCH),
    (b"{", "a JSON text in place of the picture", _FETCH),
)
_HEIF = {b"avif": "an AVIF file", b"avis": "an AVIF file"}
_BOM = re.compile(rb"\A(\xef\xbb\xbf)?\s*")
_NETPBM = re.compile(rb"\AP[1-7][\s#]")


def refused(data: bytes, readable: str) -> ImageError:
    """The error of a file that begins as none of the `readable` kinds."""
    return _picture(data) or _text(data) or _unknown(data, readable)


def _picture(data: bytes) -> ImageError | None:
    found = next(((kind, fix) for start, kind, fix in _PICTURES if data.startswith(start)), None)
    # Without its preamble a DICOM file begins with group 2 or 8 and a two-letter kind of value.
    if data[128:132] == b"DICM" or re.match(rb"[\x02\x08]\0..(?:UL|CS|UI|OB|SH)", data, re.DOTALL):
        found = "a DICOM file", _REGION
    elif data[4:8] == b"ftyp":
        brand = data[8:12].lower()
        movie = "an MP4 or QuickTime file" if brand[:3] in (b"mp4", b"iso", b"qt ", b"m4v") else "a HEIC file"
        found = _HEIF.get(brand, movie), _EXPORT
    elif _NETPBM.match(data):
        found = "a Netpbm file", _EXPORT
    elif b"<svg" in data[:4096].lower():
        found = "an SVG file", _EXPORT
    return None if found is None else ImageError("unsupported-image", *found)


def _text(data: bytes) -> ImageError | None:
    start = _BOM.sub(b"", data[:1024].lower(), count=1)
    if start.startswith(b"<?xml"):
        start = start.partition(b"?>")[2].lstrip()
    for text, found, fix in _TEXTS:
        if start.startswith(text) or (text == b"/annex/objects" and text in start[:300]):
            return ImageError("unreadable-image", found, fix)
    return None


def _unknown(data: bytes, readable: str) -> ImageError:
    if not data:
        return ImageError("unreadable-image", "an empty file", "replace it")
    if not any(data[:4096]):
        return ImageError("unreadable-image", f"{len(data)} bytes that begin with zeros", "copy the file again")
    found = f"{len(data)} bytes that are no known image format"
    return ImageError("unreadable-image", found, f"store it as one of {readable}")
