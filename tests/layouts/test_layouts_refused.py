"""What isn't read, or isn't certain, is refused by name, with its line, and without a word of a patient."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from layout_files import CHOICE, JSON_FILES, STEPS, TABLES, image_folder, png, turns, write_table

from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.layouts.condition import Condition
from composer_path.layouts.reading import Reading
from composer_path.records.rules import RecordError, problems_of

SECRET = "Miller-Jane-4711"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("pictures"))


def message_of(path: Path, images: Path, **options: Any) -> str:
    """What a conversion says that writes nothing."""
    out = path.parent / "out"
    with pytest.raises(ConvertError) as caught:
        convert(path, images, out, ids="keep", **options)
    assert not out.exists()
    message = str(caught.value)
    assert SECRET not in message
    return message


def refused(row: dict[str, Any], layout: str = "auto") -> RecordError:
    value, _ = Reading(layout=layout).record(row, 0)
    assert isinstance(value, RecordError), value
    assert SECRET not in str(value)
    return value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("image,caption\na.png,x,y\nb.png,z\n", "record 0 (line 2): .*found 3 fields for 2 columns"),
        ('image,caption\na.png,"x\n\ny"\nb.png\n', "record 1 (line 5): .*found 1 fields for 2 columns"),
        ('image,caption\na.png,"x"y\n', "record 0 (line 2): .*a quote amid a field"),
        ('image,caption\na.png,"x\nb.png,y\n', "the whole file: up to line 3: .*a quote that is not closed"),
        ("image,caption,caption\na.png,x,y\n", "the whole file: line 1: .*columns of the same name"),
        ("image,,caption\na.png,x,y\n", "the whole file: line 1: .*1 columns without a name"),
        ("image,Caption,caption\na.png,x,y\n", "the whole file: line 1: .*columns of the same name"),
        ("caption\nx\n", "the whole file: line 1: .*no two columns"),
        (f"photo,{SECRET}\na.png,x\n", "a table of 2 columns: no known key and 2 others; readable are llava"),
        ("image,caption\na.png,NaN\n", "record 0 (line 2): caption: .*nothing in it"),
        ("image,caption\na.png,NULL\n", "record 0 (line 2): caption: .*nothing in it"),
        ("image,label\na.png,x\n", "a table of 2 columns: the keys image and 1 other; readable are llava"),
        ("image,caption,question,answer\na.png,x,y,z\n", "keys of captions and questions; choose one with --layout"),
    ],
)
def test_a_table_that_is_not_certain_is_refused_with_its_line(
    text: str, found: str, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    message = message_of(path, images)
    for part in found.split(".*"):
        assert part in message, message


def test_a_table_without_utf_8_is_refused(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"image,caption\na.png,H\xe4matoxylin\n")
    assert "record 0 (line 2): the text must be UTF-8" in message_of(path, images)
    path.write_bytes("image,caption\na.png,x\n".encode("utf-16"))
    assert "the whole file: the text must be UTF-8" in message_of(path, images)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer in place of the file"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page in place of the file"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"PARE\0", "an encrypted parquet file"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_a_file_that_is_something_else_is_named(
    ending: str, data: bytes, found: str, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"data{ending}"
    path.write_bytes(data)
    assert found in message_of(path, images)
    path.write_bytes(b"")
    assert "there must be a record to write, found none" in message_of(path, images) or ending == ".csv"


@pytest.mark.parametrize("mpp", ["1_0", "\uff11", "infinity", "0x10", "1e999"])
def test_a_number_that_only_python_takes_is_refused(mpp: str, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"image,caption,mpp\na.png,x,{mpp}\n")
    assert "record 0 (line 2): mpp: a value must have the type of its key" in message_of(path, images)
    with pytest.raises(ValueError, match="must be followed by a number"):
        Condition.parse(f"mpp>{mpp}")


def test_a_flag_of_a_part_and_of_a_record_of_messages_is_refused() -> None:
    asked, told = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "!", "train": False}]}
    assert refused({"messages": [asked, parts]}).rule == "lookalike-key"
    value, _ = Reading().record({"messages": [asked, told], "weight": 0}, 0)
    assert [problem.rule for problem in problems_of(value)] == ["lookalike-key"]


def test_keys_of_a_part_that_nobody_reads_are_counted_with_its_turn() -> None:
    part = {"type": "text", "text": "?", "cache_control": {}}
    value, _ = Reading().record(
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "!"}]}, 0
    )
    assert value["conversations"][0] == {"from": "user", "value": "?", "cache_control": {}}


def test_keys_of_messages_in_another_spelling_are_told(images: Path) -> None:
    value, _ = Reading().record({"messages": [{"Role": "user", "Content": "?"}]}, 0)
    assert {problem.rule for problem in problems_of(value)} == {"lookalike-key"}


def test_a_record_by_itself_may_take_several_lines(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"image": "a.png", "caption": "x"}, indent=1))
    assert convert(path, images, tmp_path / "out", ids="keep").records == 1


def test_an_empty_field_is_refused_by_its_column(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("image,caption\na.png,\n,x\n")
    message = message_of(path, images)
    assert "record 0 (line 2): caption: a required key is absent" in message
    assert "record 1 (line 3): image: a required key is absent" in message


@pytest.mark.parametrize(
    ("data", "name", "found"),
    [
        (pickle.dumps([1]), "train.pkl", "a pickle, which runs code"),
        (pickle.dumps([1]), "train.json", "a pickle, which runs code"),
        (b"\x1f\x8b\x08\0", "data.json.gz", "gzip"),
        (b"PK\x03\x04....", "data.csv", "ZIP archive (or Excel)"),
        (json.dumps({"data": [{"image": "a.png", "caption": SECRET}]}).encode(), "a.json", "a list of 1 objects"),
        (json.dumps({SECRET: "x", "b": 1}, indent=1).encode(), "a.json", "one object for the whole file"),
        (json.dumps({SECRET: {"a": 1}}).encode(), "a.json", "no known key and 1 other"),
        (json.dumps([{SECRET: 1, "image": "a.png"}] * 30).encode(), "a.json", "the keys image and 1 other"),
        (b"image,caption\na.png,x\n", "a.txt", "name a table .csv or .tsv"),
        (b"PAR1" + b"x" * 50, "a.parquet", "truncated or damaged"),
    ],
    ids=range(10),
)
def test_a_file_of_another_kind_says_what_it_looks_like(
    data: bytes, name: str, found: str, images: Path, tmp_path: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(data)
    message = message_of(path, images)
    assert "the whole file" in message and found in message, message
    assert len(message.splitlines()) == 3


def test_bytes_in_a_text_column_of_parquet_are_refused(images: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    talk = [{"from": b"human", "value": SECRET.encode()}, {"from": b"gpt", "value": b"x"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": talk}]), path)
    assert "record 0: a value must have the type of its key, found bytes where a text" in message_of(path, images)


@pytest.mark.parametrize("name", [*JSON_FILES, *TABLES])
def test_any_value_in_any_place_of_a_row_ends_in_a_record_or_a_rule(name: str) -> None:
    rows = TABLES.get(name) or JSON_FILES[name]
    row = (list(rows.values()) if isinstance(rows, dict) else rows)[0]
    row = row["val"][0] if "val" in row else row
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    junk = [None, "", 0, -1.5, True, [], {}, [None], [{}], {"bytes": SECRET}, {"path": 3}, "\ud800", SECRET * 40, deep]
    count = 0
    for key, value in row.items():
        others: list[Any] = [{**row, key: one} for one in junk]
        if isinstance(value, list):
            others += [{**row, key: [one, *value[1:]]} for one in junk]
            for inner in value[0] if isinstance(value[0], dict) else ():
                others += [{**row, key: [{**value[0], inner: one}, *value[1:]]} for one in junk]
        for other in others:
            record, _ = Reading().record(other, 0)
            assert isinstance(record, dict | RecordError)
            problems = [record] if isinstance(record, RecordError) else problems_of(record)
            assert SECRET not in "".join(map(str, problems))
            count += 1
    assert count >= 2 * len(junk)


def test_one_unknown_record_among_good_ones_is_refused_alone(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": "x"}, {"photo": "a.png", SECRET: "x"}]))
    message = message_of(path, images)
    assert "record 1: a record must be of one layout that is read, found no known key and 2 others" in message
    assert convert(path, images, path.parent / "out", on_error="skip").rejected_by_rule == {"unknown-layout": 1}


@pytest.mark.parametrize(
    ("row", "rule", "found"),
    [
        ({"Id": "x", "Question": "?", "Choice": ["a"] * 4, "Answer": "a"}, "unsupported-layout", "WSI-VQA"),
        (
            {"Slide": SECRET, "Task": "t", "Question": "?", "A": "a", "B": "b", "C": "c", "D": "d", "Answer": "A"},
            "unsupported-layout",
            "SlideBench",
        ),
        (
            {"benchmark_name": "b", "image_path": "a", "answer": "1", "options": "[]", "prompt": "{options}"},
            "unsupported-layout",
            "MultiPathQA: it is for evaluation only",
        ),
        ({"id": "x", "image": "TCGA.pt", "conversations": turns()}, "unsupported-layout", "features of a slide"),
        ({"id": "x", "image": ["a.csv"], "conversations": turns()}, "unsupported-layout", "features of a slide"),
        ({"conversations": turns(), "messages": []}, "unknown-layout", "'conversations' and 'messages'"),
        ({"conversations": turns(), "images": ["a"], "image": "b"}, "unknown-layout", "'image' and 'images'"),
        ({"messages": turns(), "images": ["a"], "videos": ["b"]}, "unsupported-layout", "'videos'"),
        ({"image": "a.png", "Image": "b.png", "caption": "x"}, "unknown-layout", "several values"),
        ({"image": "a.png", "caption": "x", "text": "y"}, "unknown-layout", "several values that differ"),
        ({"image": "a.png", "caption": "<image> x"}, "tag-count", "<image>"),
        ({"image": "a.png", "caption": ["x", "y"]}, "wrong-type", "something else"),
        ({"wsi_id": "s", "position": ["1"], "caption": "x"}, "wrong-type", "something else"),
        ({"wsi_id": "s", "position": ["1", "2.5"], "caption": "x"}, "wrong-type", "something else"),
        ({"wsi_id": "s", "position": [True, 2], "caption": "x"}, "wrong-type", "something else"),
        (
            {"image": "a.png", "question": "?", "answer": "x", "caption": "y"},
            "unknown-layout",
            "captions and questions",
        ),
        ({"img": "a.png", **CHOICE, "answer": "C) Skin"}, "impossible-answer", "no option's letter or text"),
        ({"img": "a.png", **CHOICE, "answer": "C"}, "impossible-answer", "option 3 of 2"),
        ({"img": "a.png", **CHOICE, "answer": "A) Lung"}, "impossible-answer", "no option's letter or text"),
        ({"img": "a.png", **CHOICE, "options": ["A) x"]}, "impossible-answer", "1 options"),
        ({"img": "a.png", **CHOICE, "options": ["A) x", "B) x"]}, "impossible-answer", "comes twice"),
        ({"id": "x", "chain_of_thought": STEPS[:1]}, "truncated-chain", "announces another"),
        ({"id": "x", "chain_of_thought": [STEPS[0], {"question": "?", "answer": ""}]}, "truncated-chain", "another"),
        ({"id": "x", "chain_of_thought": []}, "truncated-chain", "no step"),
        ({"id": "x", "chain_of_thought": [{**STEPS[1], "answer": " "}]}, "truncated-chain", "without a question"),
    ],
    ids=range(25),
)
def test_a_record_that_is_not_certain_is_refused_by_its_rule(row: dict[str, Any], rule: str, found: str) -> None:
    error = refused(row)
    assert error.rule == rule
    assert found in error.found


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ({"role": "tool", "content": "x"}, "tool-turn"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "tool-turn"),
        ({"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}, "unsupported-layout"),
        ({"role": "user", "content": [{"type": "text"}]}, "wrong-type"),
        ({"role": "user", "content": ["x"]}, "wrong-type"),
        ({"role": "user", "content": "x", "value": "y"}, "unknown-layout"),
        ({"role": "user", "content": [{"type": "image", "image": "c.png"}]}, "unknown-layout"),
    ],
    ids=range(7),
)
def test_a_message_that_is_not_certain_is_refused_by_its_rule(message: dict[str, Any], rule: str) -> None:
    assert refused({"messages": [message], "images": ["a.png"]}).rule == rule


def test_letter_and_text_of_an_answer_must_agree(images: Path, tmp_path: Path) -> None:
    row = TABLES["pmc-vqa.csv"][0]
    message = message_of(write_table(tmp_path / "a.csv", [{**row, "Answer_label": "A"}]), images)
    assert "a letter and a text of different options" in message


@pytest.mark.parametrize("image", ["7", "not base64, " * 20, base64.b64encode(png()[:60] * 2).decode()])
def test_a_picture_of_a_table_must_be_one(image: str, images: Path, tmp_path: Path) -> None:
    row = TABLES["vlmevalkit.tsv"][0]
    message = message_of(write_table(tmp_path / "a.tsv", [{**row, "image": image}]), images)
    assert "record 0 (line 2): image" in message


def test_splits_that_share_records_must_be_chosen_from(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"PubMed": {"test": [], "test_tiny": [], "val": [{"img": "a.png", **CHOICE}]}}))
    assert "choose one with --where split=val" in message_of(path, images)
    assert "there must be a record to write" in message_of(path, images, where=["split=train"])


def test_addresses_are_refused_and_never_fetched(images: Path, tmp_path: Path) -> None:
    urls = [f"https://example.org/{SECRET}.png", "data:image/png;base64,iVBORw0K", "s3://bucket/a.png", "file:///a.png"]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    answer = {"role": "assistant", "content": "x"}
    path = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": [part]}, answer]} for part in parts]
    path.write_text("\n".join(map(json.dumps, rows)))
    message = message_of(path, images)
    assert "path-outside-folder 4" in message
    assert "a data URL" in message
    assert "nothing is fetched" in message


def test_a_picture_of_arch_that_is_not_there_is_counted(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    row = {"figure_id": "1", "letter": "A", "caption": "x"}
    path.write_text(json.dumps({"0": {**row, "uuid": "0f-a"}, "1": {**row, "uuid": "0f-none"}}))
    summary = convert(path, images, tmp_path / "out", on_error="skip")
    assert (summary.records, summary.rejected_by_rule) == (1, {"missing-file": 1})


def test_a_layout_of_no_name_is_refused_with_all_names(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"--layout: must be one of auto, llava, .*pathvqa"):
        convert(tmp_path / "x.json", images, tmp_path / "out", layout="slidechat")
