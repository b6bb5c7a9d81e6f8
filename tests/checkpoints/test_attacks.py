"""Nothing in a checkpoint is executed, imported or believed: attacks by every operation, in every place of one."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import EXTENSION, PICKLES, behind_stop, name, protocol, unpickle, write_sharded, write_zip
from composer.utils import checkpoint as composers

from composer_path.checkpoints.gate import is_harmless, read_pickle, require_safe_checkpoints
from composer_path.checkpoints.guarded import GuardedReader, load_sharded
from composer_path.run.export import read_checkpoint
from composer_path.weights.tensor_file import WeightsError, read_tensor_file

WEIGHT = "state.model.model.projector.weight"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """EXT1 has something to call here too."""
    copyreg.add_extension("posix", "mkdir", EXTENSION)
    yield
    copyreg.remove_extension("posix", "mkdir", EXTENSION)


def zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    write_zip(buffer, pickled)
    return buffer.getvalue()


def by_single_file(folder: Path, pickled: bytes) -> None:
    write_zip(folder / "checkpoint.pt", pickled)
    read_pickle(folder / "checkpoint.pt")


def by_composers_load_of_a_file(folder: Path, pickled: bytes) -> None:
    write_zip(folder / "checkpoint.pt", pickled)
    require_safe_checkpoints()
    composers.safe_torch_load(folder / "checkpoint.pt")


def by_metadata(folder: Path, pickled: bytes) -> None:
    (folder / ".metadata").write_bytes(pickled)
    GuardedReader(folder).read_metadata()


def by_composers_load_of_metadata(folder: Path, pickled: bytes) -> None:
    (folder / ".metadata").write_bytes(pickled)
    require_safe_checkpoints()
    composers.FileSystemReaderWithValidation(str(folder)).read_metadata()


def by_export_of_metadata(folder: Path, pickled: bytes) -> None:
    (folder / ".metadata").write_bytes(pickled)
    read_checkpoint(folder, {"projector.weight"})


def by_byte_entry(folder: Path, pickled: bytes) -> None:
    write_sharded(folder, {"weight": torch.ones(4), "wct": 3}, zipped(pickled), "wct")  # type: ignore[dict-item]
    load_sharded({"weight": torch.zeros(4), "wct": 0}, GuardedReader(folder), alone=True)


def by_tensor_entry(folder: Path, pickled: bytes) -> None:
    write_sharded(folder, {"weight": torch.ones(4)}, zipped(pickled), "weight")
    load_sharded({"weight": torch.zeros(4)}, GuardedReader(folder), alone=True)


def by_export_of_an_entry(folder: Path, pickled: bytes) -> None:
    write_sharded(folder, {WEIGHT: torch.ones(4)}, zipped(pickled), WEIGHT)
    read_checkpoint(folder, {"projector.weight"})


def by_weights_file(folder: Path, pickled: bytes) -> None:
    write_zip(folder / "pytorch_model.bin", pickled)
    read_tensor_file(folder / "pytorch_model.bin")


WAYS = [
    by_single_file,
    by_composers_load_of_a_file,
    by_metadata,
    by_composers_load_of_metadata,
    by_export_of_metadata,
    by_byte_entry,
    by_tensor_entry,
    by_export_of_an_entry,
    by_weights_file,
]


@pytest.mark.parametrize("attack", [*PICKLES, "behind the end"])
def test_no_attack_runs_by_any_way_and_each_is_one_line(attack: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickled = PICKLES.get(attack, behind_stop)(marker)
    for way in WAYS:
        folder = tmp_path / way.__name__
        folder.mkdir()
        with pytest.raises(ValueError, match=r"must (hold|be) .*found .*; ") as caught:
            way(folder, pickled)
        assert "\n" not in str(caught.value) and not marker.exists(), way.__name__
    unpickle(pickled)
    assert marker.exists() or attack == "behind the end"  # it would have run


def test_an_allowed_name_is_neither_a_pattern_nor_found_by_walking(tmp_path: Path) -> None:
    names = [("torch", "_utils"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("numpy.dtypes", "__builtins__")]
    names += [("numpy.core.multiarray", "_reconstruct.__class__"), ("collections", "OrderedDict.fromkeys")]
    names += [("torch.distributed.checkpoint.metadata", "dataclass"), ("torch.distributed.checkpoint.metadata", "os")]
    for module, attribute in names:
        for way in (by_single_file, by_metadata):
            with pytest.raises(ValueError, match=rf"found the name '{module}.{attribute}'"):
                way(tmp_path, protocol(2, name(module, attribute)))


# --- what a tensor claims --------------------------------------------------------------------------------------------


def tensor(storage: tuple[Any, ...], *arguments: Any) -> bytes:
    """The pickle of a tensor over a storage as torch.save writes it, with any claims."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return storage if value is Pickler else None

    class Claim:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Pickler, *arguments, False, {})

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"weight": Claim()})
    return buffer.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 4)
LIES: dict[str, tuple[bytes, str]] = {
    "a record of 16 bytes": (tensor((*FLOATS[:4], 4096), 0, (4096,), (1,)), "4096 elements .* a record of 16 bytes"),
    "a size of 10 TB": (tensor(FLOATS, 0, (2**42,), (1,)), "beyond its 4 stored"),
    "a size of 10 TB by stride 0": (tensor(FLOATS, 0, (2**42,), (0,)), "beyond its 4 stored"),
    "a product beyond 64 bits": (tensor(FLOATS, 0, (2**40, 2**40), (0, 0)), "beyond its 4 stored"),
    "an offset behind the end": (tensor(FLOATS, 3, (2,), (1,)), "beyond its 4 stored"),
    "an offset below 0": (tensor(FLOATS, -4, (4,), (1,)), "sizes below 0"),
    "a stride behind the end": (tensor(FLOATS, 0, (2, 2), (3, 1)), "beyond its 4 stored"),
    "a stride below 0": (tensor(FLOATS, 3, (4,), (-1,)), "sizes below 0"),
    "an offset of an empty one": (tensor(FLOATS, 2**40, (0,), (1,)), "beyond its 4 stored"),
    "sizes and strides of other lengths": (tensor(FLOATS, 0, (2, 2), (1,)), "damage"),
    "a record that isn't there": (tensor(("storage", torch.FloatStorage, "9", "cpu", 4), 0, (4,), (1,)), "no record"),
    "another file": (tensor(("storage", torch.FloatStorage, "../version", "cpu", 4), 0, (4,), (1,)), "no record"),
    "no storage": (tensor(("module", torch.FloatStorage, "0", "cpu", 4), 0, (4,), (1,)), "isn't a storage"),
    "a number as a reference": (tensor(3, 0, (4,), (1,)), "isn't a storage"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("lie", LIES)
def test_no_tensor_is_larger_than_what_is_stored_of_it(lie: str, tmp_path: Path) -> None:
    pickled, message = LIES[lie]
    write_zip(tmp_path / "weights.bin", pickled, {"data/0": bytes(16)})
    with pytest.raises(WeightsError, match=message):
        read_tensor_file(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "weights.bin")
    buffer = io.BytesIO()
    write_zip(buffer, pickled, {"data/0": bytes(16)})
    (tmp_path / "0.distcp").write_bytes(b"before" + buffer.getvalue())
    with pytest.raises(ValueError, match=message):
        is_harmless(tmp_path / "0.distcp", [(6, len(buffer.getvalue()))])


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(3, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
    ids=["coo", "csr", "quantized", "meta", "nested", "conjugated"],
)
def test_tensors_of_other_kinds_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"weight": value}, tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match=r"found (the name|a tensor|a persistent)"):
        read_tensor_file(tmp_path / "weights.bin")


# --- what a pickle costs ---------------------------------------------------------------------------------------------

DEEP: dict[str, bytes] = {
    "tuples": b"N" + b"\x85" * 200_000,
    "lists": b"]" * 200_000 + b"a" * 199_999,
    "a list in itself": b"]q\x00h\x00a",
    "lists that double": b"]" + b"q\x00]h\x00ah\x00a" * 60,
    "a tuple as key": b"}N" + b"\x85" * 200_000 + b"Ns",
    "marks": b"(" * 200_000,
    "a text of 4 exabytes": b"\x8d" + (2**62).to_bytes(8, "little") + b"x",
    "a number of 4 GB": b"\x8b\xff\xff\xff\xff",
    "bytes of 4 GB": b"B\xff\xff\xff\xffx",
    "a memo that is far away": b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("deep", DEEP)
def test_neither_depth_nor_claimed_sizes_cost_more_than_a_message(deep: str, tmp_path: Path) -> None:
    for way in (by_single_file, by_metadata, by_weights_file):
        with pytest.raises(ValueError, match="found"):
            way(tmp_path, protocol(4, DEEP[deep]))


def test_what_every_file_of_torch_holds_is_read(tmp_path: Path) -> None:
    content = {"weight": torch.arange(6.0).view(2, 3).t(), "none": None, "list": [1, 2.5, "text", (True, b"bytes")]}
    torch.save(content, tmp_path / "checkpoint.pt")
    read = read_pickle(tmp_path / "checkpoint.pt")
    assert torch.equal(read.pop("weight"), content.pop("weight")) and read == content  # type: ignore[arg-type]
