"""A JPEG file's segments and scans: strip all that makes no pixels, and see whether all pixels are there.

Decoders take a file whose data end early for a whole one as long as an end marker follows, and fill up with grey; some
also take one that lost the last scans of a progressive file. Neither is trained on here.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from composer_path.images.jpeg_frame import EOI, FRAMES, MARKER, SOS, STAND_ALONE, Frame, damaged, read_frame
from composer_path.records.rules import ImageError

# In the entropy-coded data of a scan 0xFF00 is a stuffed data byte and 0xFFD0 to D7 restart the decoder, both part of
# the data (ITU-T T.81, B.1.1).
_SCAN_CHUNK = 2**18  # a progressive file has many short scans
_DRI, _APP0, _APP14 = 0xDD, 0xE0, 0xEE
# Encoders write about ten; each makes every decoder go over the whole picture once more.
_MAX_SCANS = 100
# So many at the end of a file without an end marker are of a copy that was broken off in a place reserved for it.
_ZEROS = 64
# Frame headers, Huffman and arithmetic tables, scan, quantization tables, number of lines, restart interval.
_CODING = frozenset({*range(0xC0, 0xD0), SOS, 0xDB, 0xDC, _DRI})
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})  # APPn, comments
# Version 1.1, square pixels, no thumbnail.
_PLAIN_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"

# 64 bits that are no code of any table. A decoder wants to see so many beyond the last code it needs.
_NO_CODES, _MORE_NO_CODES = b"\xff\x00" * 8, b"\xff\x00"


def is_jpeg(data: bytes) -> bool:
    """Whether a file begins as a JPEG."""
    return data.startswith(b"\xff\xd8\xff")


class Jpeg:
    """The structure of a JPEG file; metadata, and whatever follows its end marker, is passed over.

    `ended` says whether its end marker is there; decoders do without it if the pixels are complete.

    Raises:
        ImageError: `unreadable-image`: a segment or a scan is missing; `unsupported-image`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._frame: Frame | None = None
        self._parts: list[bytes | memoryview] = [b"\xff\xd8"]
        self._num_scans = 0
        # For each component the position of the lowest bit that was sent of its 64 coefficients; 255 for none.
        self._lowest_bits: dict[int, np.ndarray] = {}
        self._restarts = False
        self.ended = self._read()
        if self._frame is None or not self._num_scans:
            raise self._refused("has no pixels")
        if not self.ended and not any(data[-_ZEROS:]):  # they are codes, of grey blocks
            raise self._refused("ends in zeros")
        if any(lowest.any() for lowest in self._lowest_bits.values()):
            raise self._refused("lacks some of its scans")

    def stripped(self) -> bytes:
        """The coding segments and scans, bit for bit, and nothing that lies before, between or after them."""
        return b"".join([*self._parts, b"\xff\xd9"])

    def complete(self, header: JpegImageFile) -> bytes:
        """What `stripped` gives, once it has been decoded (an eighth of its pixels a side) and its last scan suffices.

        The end marker is held back and bits that are no code follow the data instead. A decoder that has all it needs
        never looks at them; one that lacks data swallows them, and asks for more. What it can't tell: damage of no more
        than the last two blocks of 8 x 8 pixels, and a progressive file cut exactly at one of its restart markers.
        `header` is the file, opened but not loaded.
        """
        assert self._frame is not None and self._frame.scalable
        stripped = self.stripped()
        header.draft(None, (1, 1))  # asked of a lossless file, libjpeg writes beyond its memory
        header.load_prepare()
        decoder = Image._getdecoder(header.mode, "jpeg", header.tile[0][3], header.decoderconfig)
        decoder.setimage(header.im, header.tile[0][1])
        try:
            if not self._suffices(decoder, stripped):
                raise self._refused("ends before its pixels do")
        finally:
            decoder.cleanup()
        return stripped

    def _suffices(self, decoder: Any, stripped: bytes) -> bool:
        """Whether the decoder finishes, or, if it waits for further scans, has passed over what is no code."""
        coded = memoryview(stripped)[:-2]
        used, error = decoder.decode(coded)
        rest = bytes(coded[max(used, 0) :]) + _NO_CODES
        for _ in range(4):  # bits are taken by up to 8 bytes: by chance one time in 7 none is left over
            if used < 0:
                return error >= 0
            used, error = decoder.decode(rest)
            if (self._num_scans == 1 and used >= 0) or 0 <= used < len(rest):
                return False
            rest = _MORE_NO_CODES
        used, error = decoder.decode(b"\xff\xd9") if used >= 0 else (used, error)
        return used < 0 <= error

    def _read(self) -> bool:
        """Collect what is kept; whether there was an end marker."""
        position = 2
        while match := MARKER.search(self._data, position):
            marker, position = match[1][0], match.end()
            if marker == EOI:
                return True
            if marker in STAND_ALONE:
                continue
            segment = self._data[position : position + 2]
            length = struct.unpack(">H", segment)[0] if len(segment) == 2 else 0
            segment = self._data[position : position + length]
            if length < 2 or len(segment) < length:
                raise self._refused("ends in a segment")
            position += length
            if marker in _CODING:
                self._parts += [bytes((0xFF, marker)), segment]
                self._note(marker, segment[2:])
            elif marker in _METADATA:
                self._parts.append(_color_segment(marker, segment[2:]))
            else:  # nor does any decoder
                raise self._refused("holds a segment of no known kind")
            if marker == SOS:
                end = self._end_of_scan(position)
                self._parts.append(memoryview(self._data)[position:end])  # not copied twice
                position = end
        return False

    def _note(self, marker: int, segment: bytes) -> None:
        """Note which coefficients and bits of which components the scans bring."""
        if marker == _DRI:
            self._restarts = any(segment[:2])
        elif marker in FRAMES:
            if self._frame is not None:
                raise self._refused("has two frames")
            self._frame = read_frame(marker, segment, len(self._data))
            num_coefficients = 64 if self._frame.progressive else 1
            self._lowest_bits = {name: np.full(num_coefficients, 255) for name in segment[6::3][: segment[5]]}
        elif marker == SOS and segment and len(segment) >= 4 + 2 * segment[0]:
            self._num_scans += 1
            if self._num_scans > _MAX_SCANS:
                raise ImageError("unsupported-image", f"a JPEG of more than {_MAX_SCANS} scans", "save it again")
            first, last, bits = segment[1 + 2 * segment[0] :][:3]
            if self._frame is None or not self._frame.progressive:
                first, last, bits = 0, 0, 0
            for name in segment[1 : 1 + 2 * segment[0] : 2]:
                if name in self._lowest_bits:
                    self._lowest_bits[name][first : last + 1] = bits & 15

    def _end_of_scan(self, position: int) -> int:
        """Where the first marker that ends a scan's coded data begins, fill bytes before it included."""
        data = self._data
        for start in range(position, len(data), _SCAN_CHUNK):
            codes = np.frombuffer(data, np.uint8, min(_SCAN_CHUNK + 1, len(data) - start), start)
            found = np.flatnonzero(codes[:-1] == 0xFF)
            after = codes[found + 1]
            restarts = (after >= 0xD0) & (after <= 0xD7)
            ends = found[(after != 0) & (after != 0xFF) & ~restarts]
            if not self._restarts and restarts.any() and (not len(ends) or found[restarts][0] < ends[0]):
                raise self._refused("has a restart where there can be none")
            if len(ends):
                end = start + int(ends[0])
                while end > position and data[end - 1] == 0xFF:
                    end -= 1
                return end
        return len(data)

    def _refused(self, how: str) -> ImageError:
        return damaged(how, len(self._data))


def _color_segment(marker: int, payload: bytes) -> bytes:
    """What a decoder needs of any other segment: in which colours the data are; all else in it is made constant."""
    if marker == _APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
        return _PLAIN_JFIF
    if marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
        return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + payload[11:12]
    return b""
