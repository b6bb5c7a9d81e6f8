"""Conversion passes nothing over: faults are one record's, ids never collide, keys are counted, names stay here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_records import answer, question, record
from tiny_sets import all_samples

from composer_path.cli import main
from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.summary import ConvertSummary

GOOD = json.dumps(record())
FAULTS = {
    "duplicate-key": GOOD.replace("{", '{"organ": "colon", "organ": "kidney", ', 1),
    "bad-number": GOOD.replace("{", '{"mpp": NaN, ', 1),
    "too-deep": GOOD.replace("{", '{"meta": {"a": ' + "[" * 700 + "]" * 700 + "}, ", 1),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "imgs"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def run(images: Path, text: str, name: str = "data.json", **options: Any) -> ConvertSummary:
    data = images.parent / name
    data.write_text(text)
    return convert(data, images, images.parent / "out", **options)


@pytest.mark.parametrize("rule", FAULTS)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_fault_costs_its_record_only_and_is_named_with_its_line(images: Path, rule: str, name: str) -> None:
    lines = [GOOD, GOOD, FAULTS[rule], GOOD]
    text = "\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]"
    summary = run(images, text, name, on_error="skip", partition_size=2, workers=2)
    assert (summary.records, summary.rejected_by_rule) == (3, {rule: 1})
    (row,) = map(json.loads, (images.parent / "rejected.jsonl").read_text().splitlines())
    assert row["record"] == 2 and (row["line"] == 3 or "line 3" in row["where"])
    assert [sample.id for sample in all_samples(images.parent / "out")] != []


def test_ids_never_collide(images: Path) -> None:
    ids: list[Any] = ["1", 1, None, "record-2", "1#record-1", "1", "record-5#record-5"]
    records = [record(**({} if one is None else {"id": one})) for one in ids]
    with pytest.raises(
        ConvertError, match=r"record 1: id: .*the id of record 0.*\n.*record 5: id: .*the id of record 0"
    ):
        run(images, json.dumps(records))
    summary = run(images, json.dumps(records), duplicate_ids="keep", ids="keep", partition_size=2, workers=2)
    stored = [sample.id for sample in all_samples(images.parent / "out")]
    assert summary.records == len(set(stored)) == len(ids)
    assert stored == [
        *("1", "1#record-1", "record-2#record-2", "record-2", "1#record-1#record-4"),
        *("1#record-5", "record-5#record-5#record-6"),
    ]


def test_a_place_as_an_id_is_no_collision_where_ids_must_differ(images: Path) -> None:
    run(images, json.dumps([record(id="record-1"), record()]), ids="keep")
    assert [sample.id for sample in all_samples(images.parent / "out")] == ["record-1", "record-1#record-1"]


def test_turns_taken_out_and_tags_read_reach_the_shards(images: Path) -> None:
    records = [
        record(
            question("<IMAGE> What?"), {**answer("bad"), "loss": False}, question("?"), answer("good"), image="a.png"
        )
    ]
    with pytest.raises(ConvertError, match=r"found <IMAGE>; .*--image-tags read.*\[lookalike-tag\]"):
        run(images, json.dumps(records))
    run(images, json.dumps(records), image_tags="read")
    (sample,) = all_samples(images.parent / "out")
    assert [turn.weight for turn in sample.conversation.turns] == [1, 0, 1, 1]
    assert sample.conversation.turns[0].text == "<image> What?"


def test_keys_are_counted_and_no_name_is_printed_or_stored(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "MillerJane"
    turns = [{**question(), "score": 1, secret: 1}, answer()]
    meta = {"PatientID": secret, "kind": "stain", "StudyDate": "20200101"}
    data = images.parent / "data.json"
    data.write_text(json.dumps([record(*turns, meta=meta, hint=1, **{secret: secret}, source="\x1b[2Jcmu")] * 2))
    out = images.parent / "out"
    assert main(["convert", "--data", str(data), "--images", str(images), "--out", str(out), "--workers", "1"]) == 0
    assert main(["shards", str(out), "summary", "--workers", "1"]) == 0
    output = capfd.readouterr()
    card = json.loads((out / "dataset.json").read_text())
    assert card["unknown_keys"] == {"(not a plain name)": 2, "hint": 2}
    assert card["unknown_turn_keys"] == {"(not a plain name)": 2, "score": 2}
    assert (card["kept_meta_keys"], card["hashed_meta_keys"]) == ({"kind": 2}, {"PatientID": 2, "StudyDate": 2})
    for line in ("ignored key hint", "ignored turn key score", "kept in meta: kind", "hashed in meta: PatientID"):
        assert line in output.out
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert secret not in output.out + output.err and secret.encode() not in everything and b"20200101" not in everything
    assert "\x1b" not in output.out + output.err and "\\x1b[2Jcmu" in output.out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('[{"a": 1},\n{"a": ]'.encode("utf-16"), "UTF-16"),
        (b"[" + GOOD.encode() + b",\n{]", "record 1, which begins at line 2"),
        (GOOD.encode() + GOOD.encode(), "more after its end"),
        (b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\0", "a NUL byte at line 2"),
        (b"[" + GOOD.encode() + b",]", "a comma before a closing bracket"),
        (b"[" * 100_000, "without an end"),
    ],
)
def test_a_file_that_is_no_json_ends_in_one_message(
    images: Path, capfd: pytest.CaptureFixture[str], data: bytes, said: str
) -> None:
    file = images.parent / "data.json"
    file.write_bytes(data)
    assert main(["convert", "--data", str(file), "--images", str(images), "--out", str(images.parent / "out")]) == 1
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error
