"""Conversion: what is written can be read back, what is bad is named, and nothing that identifies leaves."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from composer_path.conversion.convert import convert
from composer_path.conversion.identifiers import IDENTIFYING_KEYS, read_or_make_key
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.summary import ConvertSummary
from composer_path.records.conversation import Conversation
from composer_path.records.rules import RULES
from composer_path.shards.columns import FORMAT_VERSION, pack_images, unpack_images

REPO = Path(__file__).resolve().parents[2]
BAD = REPO / "test_data" / "bad"
BAD_FILES = sorted(path for path in BAD.iterdir() if path.suffix in (".json", ".jsonl", ".csv"))
SECRET = "Miller-Jane-4711"


def turns(question: str = "Which stain?", answer: str = "PAS.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def image_bytes(format: str = "PNG", color: tuple[int, int, int] = (200, 120, 180), **save: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), color).save(file, format, **save)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with three images; tests write their data.json into it."""
    images = tmp_path / "input" / "imgs"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(image_bytes())
    (images / "b.jpg").write_bytes(image_bytes("JPEG", (90, 60, 150)))
    (images / "c.tiff").write_bytes(image_bytes("TIFF", (10, 200, 30)))
    return tmp_path / "input"


def write(source: Path, records: object) -> Path:
    path = source / "data.json"
    path.write_text(json.dumps(records))
    return path


def run(source: Path, records: object, out: Path, **options: Any) -> ConvertSummary:
    return convert(write(source, records), source / "imgs", out, **options)


def read_back(folder: Path) -> list[dict[str, Any]]:
    """All samples, by streaming's own readers and with its hash check, without its shared memory."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    samples = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        raw = shard["raw_data"]
        data = (folder / raw["basename"]).read_bytes()
        assert len(data) == raw["bytes"]
        assert all(get_hash(name, data) == value for name, value in raw["hashes"].items())
        reader = reader_from_json(str(folder), None, shard)
        samples += [reader[index] for index in range(shard["samples"])]
    return samples


def all_bytes(folder: Path) -> bytes:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return b"".join(path.read_bytes() for path in files)


def test_packed_images_come_back() -> None:
    for images in ([], [b"abc"], [b"", b"x" * 1000, b"yz"]):
        assert unpack_images(pack_images(images)) == images


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x02\x00\x00\x00\x01", pack_images([b"abc"])[:-1], b"\xff" * 64])
def test_damaged_packed_images_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged or not of this format"):
        unpack_images(data)


def test_every_rule_has_a_bad_record() -> None:
    assert {path.name.split(".")[0] for path in BAD_FILES} == set(RULES)
    readme = (BAD / "README.md").read_text()
    assert [path.name for path in BAD_FILES if f"`{path.name}`" not in readme] == []


@pytest.mark.parametrize("path", BAD_FILES, ids=lambda path: path.name)
def test_each_bad_record_breaks_exactly_its_rule(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConvertError) as caught:
        convert(path, BAD / "imgs", out)
    assert caught.value.rejections is not None
    assert [error.rule for _, _, error in caught.value.rejections.problems] == [path.name.split(".")[0]]
    assert not out.exists()


def test_shards_hold_what_the_records_hold(source: Path, tmp_path: Path) -> None:
    records = [
        {"id": "r0", "image": "a.png", "conversations": turns("<image>\nWhich stain?")},
        {"id": "r1", "conversations": turns("What is PAS?", "A stain.\n"), "system": "Be brief."},
        {"id": 2, "image": ["b.jpg", "c.tiff"], "conversations": turns("<image> or <image>?"), "stain": "PAS"},
        {"image": "b.jpg", "conversations": [{"from": "gpt", "value": "Hi."}, *turns()], "mpp": 0.5},
    ]
    summary = run(source, records, tmp_path / "out", ids="keep")
    samples = read_back(tmp_path / "out")
    assert [sample["id"] for sample in samples] == ["r0", "r1", "2", "record-3"]
    for record, sample in zip(records, samples, strict=True):
        images = unpack_images(sample["images"])
        restored = Conversation.from_shard(sample["conversation"], len(images))
        expected = Conversation.from_record(record)
        assert (restored.turns, restored.system) == (expected.turns, expected.system)
        assert sample["metadata"] == {**expected.metadata, "images": list(expected.images)}
    assert unpack_images(samples[0]["images"])[0] == (source / "imgs" / "a.png").read_bytes()
    restored_tiff = Image.open(io.BytesIO(unpack_images(samples[2]["images"])[1]))
    assert restored_tiff.getpixel((0, 0)) == (10, 200, 30)

    assert (summary.records, summary.images, summary.text_only, summary.turns) == (4, 4, 1, 8)
    assert (summary.without_tag, summary.dropped_turns, summary.rejected) == (1, 1, 0)
    assert (summary.shards, summary.bytes) == (1, (tmp_path / "out" / "part-00000" / "shard.00000.mds").stat().st_size)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["format_version"] == FORMAT_VERSION
    assert (info["records"], info["images"], info["options"]["ids"]) == (4, 4, "keep")


def test_many_records_keep_their_order(source: Path, tmp_path: Path) -> None:
    records = [
        {"id": i, "image": "abc"[i % 3] + (".png", ".jpg", ".tiff")[i % 3], "conversations": turns(f"{i}")}
        for i in range(150)
    ]
    run(source, records, tmp_path / "out", ids="keep")
    assert [sample["id"] for sample in read_back(tmp_path / "out")] == [str(i) for i in range(150)]


def test_metadata_of_images_is_not_in_the_shards(source: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = exif[0x927C] = SECRET
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", SECRET)
    text.add_text("Comment", SECRET, zip=True)
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SECRET}</x:xmpmeta>".encode()
    planted = {
        "exif.jpg": image_bytes("JPEG", exif=exif),
        "xmp.jpg": image_bytes("JPEG", xmp=xmp),
        "comment.jpg": image_bytes("JPEG", comment=SECRET.encode()),
        "profile.jpg": image_bytes("JPEG", icc_profile=SECRET.encode() * 8),
        "end.jpg": image_bytes("JPEG") + SECRET.encode(),
        "text.png": image_bytes(pnginfo=text, exif=exif),
        "tags.tiff": image_bytes("TIFF", description=SECRET),
    }
    rotated = Image.Exif()
    rotated[0x0112], rotated[0x010E] = 6, SECRET
    planted["rotated.jpg"] = image_bytes("JPEG", exif=rotated)
    for name, data in planted.items():
        assert SECRET.encode() in data or name == "text.png", name
        (source / "imgs" / name).write_bytes(data)
    summary = run(source, [{"image": name, "conversations": turns()} for name in planted], tmp_path / "out")
    assert summary.images == len(planted) == 8
    assert SECRET.encode() not in all_bytes(tmp_path / "out")
    rotated_image = Image.open(io.BytesIO(unpack_images(read_back(tmp_path / "out")[-1]["images"])[0]))
    assert rotated_image.size == (24, 32)


def test_identifiers_are_stored_as_keyed_hashes(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "imgs" / "a.png", source / "imgs" / f"{SECRET}.png")
    meta = {"Patient-ID": SECRET, "deep": [{"slide": [SECRET, {SECRET: 1}]}], "grade": 2, "file_name": SECRET}
    identifying = {"id": SECRET, "patient": SECRET, "slide": SECRET, "image": f"{SECRET}.png", "meta": meta}
    records = [{**identifying, "conversations": turns()}, {"patient": SECRET, "conversations": turns()}]
    summary = run(source, records, tmp_path / "out")
    assert SECRET.encode() not in all_bytes(tmp_path / "out")
    assert b"Miller" not in all_bytes(tmp_path / "out")
    first, second = read_back(tmp_path / "out")
    metadata = first["metadata"]
    assert metadata["patient"] == second["metadata"]["patient"] == metadata["meta"]["Patient-ID"]
    assert metadata["meta"]["grade"] == 2
    assert len({first["id"], metadata["patient"], metadata["slide"], metadata["images"][0]}) == 4
    # Without the key a guessed name can't be tested.
    assert first["id"] != hashlib.sha256(SECRET.encode()).hexdigest()[:32]

    key, mapping = source / "identifiers.key", source / "data.idmap.jsonl"
    assert summary.mapping_file == mapping
    for path in (key, mapping):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entries = [json.loads(line) for line in mapping.read_text().splitlines()]
    assert {"kind": "patient", "value": SECRET, "hash": metadata["patient"]} in entries
    assert not (tmp_path / "out" / "identifiers.key").exists()


def test_hashes_stay_the_same_while_the_key_does(source: Path, tmp_path: Path) -> None:
    record = {"id": "x", "patient": "P", "conversations": turns()}
    first = run(source, [record], tmp_path / "one")
    run(source, [{**record, "id": "y"}], tmp_path / "two")
    run(source, [record], tmp_path / "other", key=tmp_path / "other.key")
    ids = {name: read_back(tmp_path / name)[0]["metadata"]["patient"] for name in ("one", "two", "other")}
    assert ids["one"] == ids["two"] != ids["other"]
    assert first.mapping_file is not None
    values = [json.loads(line)["value"] for line in first.mapping_file.read_text().splitlines()]
    assert sorted(values) == ["P", "x", "y"]
    assert (tmp_path / "data.idmap.jsonl").exists()


def test_kept_identifiers_need_no_key(source: Path, tmp_path: Path) -> None:
    run(
        source,
        [{"id": "x", "patient": 3, "meta": {"patient": "P"}, "conversations": turns()}],
        tmp_path / "out",
        ids="keep",
    )
    (sample,) = read_back(tmp_path / "out")
    assert sample["metadata"] == {"patient": "3", "meta": {"patient": "P"}, "images": []}
    assert not list(source.glob("*.key"))


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("secret")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        read_or_make_key(tmp_path / "k")
    assert set(IDENTIFYING_KEYS.values()) == {"id", "patient", "slide", "image"}


MIXED: list[Any] = [
    {"id": "good", "image": "a.png", "conversations": turns(SECRET)},
    {"id": SECRET, "image": "no.png", "conversations": turns(SECRET, SECRET)},
    {"id": "good", "image": "b.jpg", "conversations": turns(f"<image><image>{SECRET}")},
    {"id": "fine", "conversations": turns(), "hint": 1, SECRET + " said": 2},
]


def test_fail_writes_nothing_and_lists_all_problems(source: Path, tmp_path: Path) -> None:
    before = sorted(source.rglob("*"))
    with pytest.raises(ConvertError) as caught:
        run(source, MIXED, tmp_path / "out")
    message = str(caught.value)
    for part in ("record 1: image 1 of 1", "[missing-file]", "record 2: conversations", "[duplicate-id]"):
        assert part in message
    assert "rejected by rule: missing-file 1, tag-count 1, duplicate-id 1" in message
    assert SECRET not in message
    assert not (tmp_path / "out").exists()
    # The key is kept: another conversion may have begun to use it.
    assert sorted(source.rglob("*")) == sorted([*before, source / "data.json", source / "identifiers.key"])


def test_skip_writes_the_good_and_lists_the_bad(source: Path, tmp_path: Path) -> None:
    summary = run(source, MIXED, tmp_path / "out", on_error="skip", ids="keep")
    assert [sample["id"] for sample in read_back(tmp_path / "out")] == ["good", "fine"]
    assert summary.rejected == 2
    assert summary.rejected_by_rule == {"missing-file": 1, "tag-count": 1, "duplicate-id": 1}
    assert summary.unknown_keys == {"hint": 1, "(not a plain name)": 1}
    assert SECRET not in str(summary)

    rejected = source / "rejected.jsonl"
    assert summary.rejected_file == rejected
    assert stat.S_IMODE(rejected.stat().st_mode) == 0o600
    rows = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(row["record"], row["id"], row["rule"]) for row in rows] == [
        (1, SECRET, "missing-file"),
        (2, "good", "tag-count"),
        (2, "good", "duplicate-id"),
    ]
    assert SECRET not in json.dumps([{**row, "id": None} for row in rows])
    assert b"no.png" not in rejected.read_bytes()


def test_many_problems_are_counted_and_can_be_listed_in_a_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as caught:
        run(source, ["x"] * 50, tmp_path / "out", rejected=tmp_path / "all.jsonl")
    assert len(str(caught.value).splitlines()) < 25
    assert "and 30 problems more" in str(caught.value)
    assert "not-an-object 50" in str(caught.value)
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize("records", [[], [{"conversations": []}]])
def test_nothing_to_write_is_an_error(source: Path, tmp_path: Path, records: list[Any]) -> None:
    with pytest.raises(ConvertError, match="there must be a record to write"):
        run(source, records, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "--on-error"),
        ({"ids": "none"}, "--ids"),
        ({"size_limit": "64 apples"}, "--size-limit"),
        ({"size_limit": "4gb"}, "--size-limit"),
        ({"size_limit": 0}, "--size-limit"),
        ({"size_limit": "64"}, "--size-limit: must have a unit, found '64'; give one, as in 64mb"),
        ({"hashes": ["crc"]}, "hashes"),
        ({"check": "none"}, "--check"),
        ({"engine": "dask"}, "--engine"),
        ({"workers": 0}, "--workers"),
        ({"partition_size": 0}, "--partition-size"),
        ({"resized": {"image_size": 0}}, "--resize"),
        ({"part": "3/2"}, "--part"),
        ({"part": "0/2"}, "--part"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
        ({"overwrite": True, "part": "1/2"}, "--overwrite"),
    ],
)
def test_wrong_options_are_refused_first(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        run(source, ["bad"], tmp_path / "out", **options)


def test_missing_input_and_used_output_are_refused(source: Path, tmp_path: Path) -> None:
    data = write(source, [{"conversations": turns()}])
    with pytest.raises(ConvertError, match="--data"):
        convert(source / "no.json", source / "imgs", tmp_path / "out")
    with pytest.raises(ConvertError, match="--images"):
        convert(data, source / "no", tmp_path / "out")
    with pytest.raises(ConvertError, match=r"--images http://host/imgs: must be a folder, s3://.*; found http://"):
        convert(data, "http://me:word@host/imgs?a=b", tmp_path / "out")
    with pytest.raises(ConvertError, match="must be empty"):
        convert(data, source / "imgs", source)
    (tmp_path / "empty").mkdir()
    convert(data, source / "imgs", tmp_path / "empty")
    with pytest.raises(ConvertError, match="must be empty"):
        convert(data, source / "imgs", tmp_path / "empty")


def test_an_unreadable_file_is_a_problem_of_its_record(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        if path.name != "a.png":
            return read(path)
        raise PermissionError(13, "Permission denied", str(path))

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConvertError, match=r"found Permission denied.*\[unreadable-image\]") as caught:
        run(source, [{"image": "a.png", "conversations": turns()}], tmp_path / "out")
    assert "a.png" not in str(caught.value)


def test_pixels_above_the_limit_are_refused(source: Path, tmp_path: Path) -> None:
    records = [{"image": "a.png", "conversations": turns()}]
    with pytest.raises(ConvertError, match="too-many-pixels"):
        run(source, records, tmp_path / "out", max_pixels=32 * 24 - 1)
    run(source, records, tmp_path / "out", max_pixels=32 * 24)
