"""Files of `torch.save`: read as torch reads them, without unpickling, and never beyond what is stored."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from attacks import write_zip

from composer_path.weights.tensor_file import WeightsError, read_tensor_file
from composer_path.weights.torch_file import TorchFileError, read_torch_buffer, read_torch_file

FILE_OF_NONE = b"\x80\x02N."


def test_every_dtype_layout_and_sharing_comes_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    content = {str(dtype): torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.uint16)}
    content |= {"float8": torch.ones(3).to(torch.float8_e4m3fn), "complex": torch.ones(3, dtype=torch.complex64)}
    content |= {"base": base, "transposed": base.t(), "row": base[1], "empty": base[:0], "scalar": base[0, 0]}
    content["parameter"] = torch.nn.Parameter(base)
    torch.save(content, tmp_path / "file.pt")
    ours, theirs = read_torch_file(tmp_path / "file.pt"), torch.load(tmp_path / "file.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].stride() == value.stride(), key
        assert torch.equal(ours[key].float(), value.float()) and type(ours[key]) is type(value), key
    assert ours["row"].untyped_storage().data_ptr() == ours["base"].untyped_storage().data_ptr()


def test_a_modules_state_dict_keeps_the_versions_of_its_layers(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    torch.save(state, tmp_path / "file.pt")
    read = read_torch_file(tmp_path / "file.pt")
    assert type(read) is OrderedDict and read._metadata == state._metadata  # type: ignore[attr-defined]


def test_a_file_is_not_changed_by_who_writes_into_its_tensors(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4)}, tmp_path / "file.pt")
    before = (tmp_path / "file.pt").read_bytes()
    read_torch_file(tmp_path / "file.pt")["weight"].fill_(7)
    assert (tmp_path / "file.pt").read_bytes() == before


def test_a_file_of_an_old_torch_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"before torch 1\.6; convert it: .*weights_only=True.*save_file"):
        read_tensor_file(tmp_path / "old.bin")


def archive(*records: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as file:
        warnings.simplefilter("ignore")  # a name twice
        for name, data in records:
            file.writestr(name, data)
    return bytearray(buffer.getvalue())


PICKLE = ("archive/data.pkl", FILE_OF_NONE)


def renamed(data: bytearray, old: bytes, new: bytes) -> bytearray:
    """The same with a name changed in the table of records alone."""
    at = data.rindex(old)
    data[at : at + len(old)] = new
    return data


def two_over_each_other() -> bytearray:
    data = archive(PICKLE, ("archive/data/0", bytes(16)))
    first, second = data.index(b"PK\x01\x02"), data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(PICKLE, PICKLE), "a record 'archive/data.pkl' twice"),
        (archive(PICKLE, ("archive/DATA.PKL", FILE_OF_NONE)), "twice, but for large"),
        (archive(PICKLE, ("other/data.pkl", FILE_OF_NONE)), "outside of 'archive'"),
        (archive(PICKLE, ("data.pkl", FILE_OF_NONE)), "outside of 'archive'"),
        (archive(("archive/other", b"")), "without data.pkl"),
        (archive(PICKLE, ("archive/constants.pkl", FILE_OF_NONE)), "TorchScript"),
        (archive(PICKLE, ("archive/byteorder", b"big")), "byte order"),
        (archive(PICKLE, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (renamed(archive(PICKLE), b"data.pkl", b"dota.pkl"), "called otherwise in the table"),
        (two_over_each_other(), "called otherwise|over each other"),
        (archive(PICKLE)[:-1], "cut, or has something behind"),
        (archive(PICKLE) + b"x", "cut, or has something behind"),
        (archive(PICKLE) + archive(PICKLE), "more than its records"),
        (bytearray(b"PK\x03\x04"), "damaged|cut"),
        (bytearray(b"\x80\x02N."), "another kind of file"),
        (bytearray(), "another kind of file"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(data: bytearray, message: str) -> None:
    with pytest.raises(TorchFileError, match=message):
        read_torch_buffer(data)


def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((64,), 3.0)}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    data[data.index(struct.pack("<f", 3.0) * 64) + 3] ^= 0x40
    with pytest.raises(TorchFileError, match=r"'data/0' that doesn't match its checksum"):
        read_torch_buffer(data)


def test_tensors_that_lie_at_odd_places_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(4.0)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        records = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
    for shift in range(1, 9):
        write_zip(tmp_path / "file.pt", records["data.pkl"], {"x" * shift: b"", "data/0": records["data/0"]})
        assert torch.equal(read_torch_file(tmp_path / "file.pt")["weight"], torch.arange(4.0))
