"""The zip file that `torch.save` writes: where each of its records lies. One reader, so that no two differ about it."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

END, END_64, LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
ENTRY, LOCAL = b"PK\x01\x02", b"PK\x03\x04"
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF  # what stands for "see the 64-bit field"
# What files of before torch 1.6 begin with: a pickled number.
OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class ZipError(ValueError):
    """A file that isn't laid out as torch writes it; the message says what was found, `fix` what to do, if known."""

    def __init__(self, found: str, fix: str | None = None) -> None:
        super().__init__(found)
        self.fix = fix


class Record(NamedTuple):
    """One file of a zip."""

    start: int  # of its bytes
    length: int
    checksum: int


class TorchZip:
    """The records of a file of `torch.save`, by their names behind the archive's own.

    Args:
        buffer: The whole file: bytes, or a mapped file.

    Raises:
        ZipError: No such file, or records that are compressed, twice there, beside the file or over each other.
    """

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.bytes = buffer, memoryview(buffer).cast("B")
        if bytes(self.bytes[: len(OLD_MAGIC)]) == OLD_MAGIC:
            raise ZipError(
                "a file in the format of before torch 1.6",
                "convert it: tensors = torch.load(FILE, weights_only=True); safetensors.torch.save_file(tensors, NEW)",
            )
        if bytes(self.bytes[:4]) != LOCAL:
            raise ZipError("another kind of file")
        try:
            self.records = self._records()
        except (struct.error, UnicodeDecodeError):
            raise ZipError("a damaged zip file") from None
        if "constants.pkl" in self.records:
            raise ZipError("a TorchScript program, which is code")
        if "data.pkl" not in self.records:
            raise ZipError("a zip file without data.pkl")
        if "byteorder" in self.records and bytes(self.read("byteorder")) != b"little":
            raise ZipError("another byte order than little endian")

    def read(self, name: str) -> memoryview:
        """The bytes of a record, which is as long as it says and matches its checksum."""
        if name not in self.records:
            raise ZipError(f"no record {name[:80]!r}")
        record = self.records[name]
        data = self.bytes[record.start : record.start + record.length]
        if zlib.crc32(data) != record.checksum:
            raise ZipError(f"a record {name[:80]!r} that doesn't match its checksum")
        return data

    def _records(self) -> dict[str, Record]:
        start, size, count = self._directory()
        found: dict[str, Record] = {}
        spans: list[tuple[int, int]] = []
        archive, at = None, start
        for _ in range(count):
            name, record, at = self._entry(at)
            top, _, inner = name.partition("/")
            archive = top if archive is None else archive
            if top != archive or not inner:
                raise ZipError(f"a record {name[:80]!r} outside of {archive[:80]!r}")
            if inner in found:
                raise ZipError(f"a record {name[:80]!r} twice")
            found[inner] = record
            spans.append((record.start, record.start + record.length))
        if len({name.casefold() for name in found}) != len(found):  # torch's reader doesn't tell them apart
            raise ZipError("records twice, but for large and small letters")
        spans.sort()
        if at != start + size or any(
            end > after for (_, end), (after, _) in zip(spans, [*spans[1:], (start, 0)], strict=True)
        ):
            raise ZipError("records that lie over each other")
        return found

    def _directory(self) -> tuple[int, int, int]:
        """Where the table of records starts, its size, and how many there are."""
        end = len(self.bytes) - 22
        signature, disk, first, here, count, size, start, comment = struct.unpack_from("<4s4H2IH", self.bytes, end)
        if signature != END or disk or first or here != count or comment:
            raise ZipError("a zip file that is cut, or has something behind it")
        if bytes(self.bytes[end - 20 : end - 16]) == LOCATOR_64:
            _, disk, wide, disks = struct.unpack_from("<4sIQI", self.bytes, end - 20)
            fields = struct.unpack_from("<4sQHHIIQQQQ", self.bytes, wide)
            signature, _, _, _, this, first, here, wide_count, wide_size, wide_start = fields
            narrow = (min(wide_count, FULL_16), min(wide_size, FULL_32), min(wide_start, FULL_32))
            if signature != END_64 or disk or this or first or disks > 1 or here != wide_count:
                raise ZipError("a damaged zip file")
            if (count, size, start) != narrow:
                raise ZipError("a zip file with two tables of its records")
            count, size, start, end = wide_count, wide_size, wide_start, wide
        if start + size != end:
            raise ZipError("a zip file with more than its records and their table")
        return start, size, count

    def _entry(self, at: int) -> tuple[str, Record, int]:
        """One line of the table: name, record, and where the next line starts."""
        fields = struct.unpack_from("<4s6H3I5H2I", self.bytes, at)
        signature, _, _, flags, method, _, _, checksum, packed, length, name_length, extra_length, comment = fields[:13]
        disk, offset = fields[13], fields[16]
        name_at = at + 46
        next_at = name_at + name_length + extra_length + comment
        if signature != ENTRY or disk or flags & 1 or next_at > len(self.bytes):
            raise ZipError("a damaged zip file")
        name = bytes(self.bytes[name_at : name_at + name_length])
        sizes = self._wide(name_at + name_length, extra_length, length, packed, offset)
        length, packed, offset = sizes
        if method or packed != length:
            raise ZipError("compressed records, which torch never writes")
        local = struct.unpack_from("<4s22xHH", self.bytes, offset)
        start = offset + 30 + local[1] + local[2]
        if local[0] != LOCAL or bytes(self.bytes[offset + 30 : offset + 30 + local[1]]) != name:
            raise ZipError("a record that is called otherwise in the table")
        if start + length > len(self.bytes):
            raise ZipError("records that end behind the file")
        return name.decode(), Record(start, length, checksum), next_at

    def _wide(self, at: int, extra_length: int, *numbers: int) -> list[int]:
        """Numbers of an entry, those that are full replaced by their 64-bit fields."""
        end, wide = at + extra_length, b""
        while at + 4 <= end:
            kind, length = struct.unpack_from("<HH", self.bytes, at)
            if kind == 1:
                wide = bytes(self.bytes[at + 4 : at + 4 + length])
            at += 4 + length
        values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
        return [next(values, number) if number == FULL_32 else number for number in numbers]
