"""The verb `shards`: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_path.cli import main
from composer_path.conversion.convert import convert
from composer_path.images.pixels import load_image
from composer_path.records.conversation import Conversation
from composer_path.shards.view import ShardView

REPO = Path(__file__).resolve().parents[2]
IMAGES = REPO / "test_data" / "imgs"
NUM_RECORDS = 24


def look(shards: Path | str, *words: str) -> int:
    """The exit code; argparse's too."""
    try:
        return main(["shards", str(shards), *words])
    except SystemExit as ending:
        return int(str(ending.code))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return json.loads((REPO / "test_data" / "data.json").read_text())[:NUM_RECORDS]


def convert_records(folder: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps(records))
    convert(folder / "data.json", IMAGES, folder / "set", partition_size=10, **options)
    return folder / "set"


@pytest.fixture(scope="module")
def shards(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, with plain ids."""
    folder = convert_records(tmp_path_factory.mktemp("view") / "kept", records, ids="keep")
    assert sorted(path.name for path in folder.glob("part-*")) == ["part-00000", "part-00001", "part-00002"]
    return folder


@pytest.fixture(scope="module")
def resized(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    square = {"image_size": 56, "fit": "pad", "pad_color": [9, 8, 7]}
    return convert_records(tmp_path_factory.mktemp("view") / "resized", records, resized=square)


def with_one_image(records: list[dict[str, Any]]) -> int:
    return next(n for n, record in enumerate(records) if isinstance(record.get("image"), str))


def texts(records: list[dict[str, Any]]) -> list[str]:
    """Turns that are long enough not to stand in a table by chance."""
    found = [turn["value"] for record in records for turn in record["conversations"] if len(turn["value"]) > 20]
    assert found
    return found


def test_the_summary_counts_and_never_prints_text(
    shards: Path, records: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert look(shards, "summary", "--workers", "1") == 0
    output = capfd.readouterr().out
    table = {line[:36].strip(): line[36:] for line in output.splitlines()}
    conversations = [Conversation.from_record(record) for record in records]
    assert table["records"] == str(NUM_RECORDS) == table["card: records"]
    assert table["images"] == str(sum(conversation.num_images for conversation in conversations))
    assert (table["shards"], table["card: partitions"]) == ("3", "3")
    assert json.loads(table["card: options"])["ids"] == "keep"
    assert sum(int(count) for name, count in table.items() if name.startswith("source ")) == NUM_RECORDS
    assert [text for text in texts(records) if text in output] == []
    assert [record["id"] for record in records if str(record["id"]) in output] == []


def test_show_prints_one_record_and_writes_its_picture(
    shards: Path, records: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    number = with_one_image(records)
    for words in ([str(number)], [records[number]["id"]], [records[number]["id"], "--id"]):
        assert look(shards, "show", *words, "--out", str(tmp_path / "pictures")) == 0
        output = capfd.readouterr().out
        assert f"position        {number}\n" in output
        assert all(turn["value"] in output for turn in records[number]["conversations"])
        (picture,) = (tmp_path / "pictures").iterdir()
        assert str(picture) in output
        shown, original = Image.open(picture), Image.open(IMAGES / records[number]["image"])
        assert np.array_equal(np.asarray(shown), np.asarray(original))


def test_show_writes_a_finished_square_as_a_picture(
    resized: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    number = with_one_image(records)
    assert look(resized, "show", str(number), "--out", str(tmp_path)) == 0
    shown = np.asarray(Image.open(tmp_path / f"sample-{number}-image-1.png"))
    data = (IMAGES / records[number]["image"]).read_bytes()
    assert np.array_equal(shown, load_image(data, 56, pad_color=(9, 8, 7)).permute(1, 2, 0).numpy())


def test_show_takes_hashed_ids_and_names_no_record_that_is_not_there(
    resized: Path, records: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hashed = ShardView(resized).sample(3).id
    assert look(resized, "show", hashed, "--out", str(tmp_path)) == 0
    assert "position        3\n" in capfd.readouterr().out
    for words in ([records[3]["id"]], [str(NUM_RECORDS)], ["3", "--id"]):
        assert look(resized, "show", *words, "--out", str(tmp_path)) == 2
        output = capfd.readouterr()
        assert output.out == ""
        assert "no sample has this id (ids are stored as keyed hashes)" in output.err or "0 to 23" in output.err


def test_a_terminal_does_not_obey_a_records_text(
    records: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "a\x1b[2Jb\rc\x9b"}, {"from": "assistant", "value": "two\nlines\tand a tab"}]
    folder = convert_records(tmp_path / "set", [{"conversations": turns}])
    assert look(folder, "show", "0") == 0
    output = capfd.readouterr().out
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output) is None
    assert "two\nlines\tand a tab" in output


@pytest.mark.parametrize("name", ["shards", "resized"])
def test_a_whole_set_passes_and_a_damaged_one_is_listed_with_exit_status_1(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(request.getfixturevalue(name), folder)
    template = ["--template", "llava_llama_2", "--tokenizer", str(REPO / "test_data" / "tokenizer")]
    assert look(folder, "verify", "--workers", "2", *template, "--image-tokens", "4") == 0
    assert capfd.readouterr().out.startswith("3 shards, 24 samples and ")

    shard = folder / "part-00001" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (folder / "part-00002" / "shard.00000.mds").unlink()
    assert look(folder, "verify", "--workers", "2") == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("part-00001/shard.00000.mds: hash: xxh64 ")
    assert any(line.startswith("part-00002/shard.00000.mds: unreadable: there is no such file") for line in lines)
    assert re.search(r"[2-4] problems$", lines[-1])


def test_conditions_and_draws_make_new_sets(shards: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    source = next(record["source"] for record in records if "source" in record)
    expected = [record["id"] for record in records if record.get("source") == source]
    assert 0 < len(expected) < NUM_RECORDS
    chosen = tmp_path / "chosen"
    assert look(shards, "filter", f"source={source}", "--out", str(chosen)) == 0
    view = ShardView(chosen)
    assert [view.sample(n).id for n in range(len(view))] == expected

    # Conditions may stand before and after the options.
    for number, words in enumerate((["2", f"source={source}"], ["2"])):
        out = tmp_path / str(number)
        after = [] if len(words) == 2 else [f"source={source}"]
        assert look(shards, "sample", *words, "--out", str(out), "--seed", "5", *after) == 0
        drawn = [sample.id for sample in ShardView(out).samples(0)]
        assert len(drawn) == 2
        assert set(drawn) <= set(expected)
        assert look(out, "verify", "--workers", "1") == 0
    assert (tmp_path / "0" / "index.json").read_bytes() == (tmp_path / "1" / "index.json").read_bytes()


def test_a_choice_of_nothing_writes_nothing(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["filter", "source=nowhere", "--out", str(tmp_path / "out")], "no sample fits"),
        (["filter", "colour=red", "--out", str(tmp_path / "out")], "must be one of id, source"),
        (["sample", "99", "--out", str(tmp_path / "out")], "24 samples to draw from, not 99"),
        (["sample", "2", "--out", str(shards)], "must be empty"),
    ):
        assert look(shards, *words) == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ([], "required: ACTION"),
        (["shout"], "invalid choice: 'shout'"),
        (["show"], "required: ID|N"),
        (["filter", "--out", "x"], "required: CONDITION"),
        (["filter", "source=cmu"], "required: --out"),
        (["sample", "three", "--out", "x"], "invalid int value: 'three'"),
        (["verify", "--template", "plain"], "--template and --tokenizer go together"),
        (["verify", "--workers", "0"], "must be a whole number of at least 1, found '0'"),
        (["summary", "source=cmu"], "unrecognized arguments: source=cmu"),
        (["sample", "3", "--out", "x", "--sed", "4", "--quick"], "unrecognized arguments: --sed 4 --quick"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2(words: list[str], rule: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert look("DIR", *words) == 2
    assert rule in capfd.readouterr().err


def test_what_is_no_set_is_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert look(tmp_path, "summary") == 2
    assert "must hold index.json, found none" in capfd.readouterr().err
