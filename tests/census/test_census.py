"""A census counts what is there, whatever is refused, and shows pictures but no words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_path.census.census import Census, take_census
from composer_path.census.page import page_of
from composer_path.census.report import json_of, text_of_census
from composer_path.census.tally import bin_of
from composer_path.cli import main

SECRET = "Adenocarcinoma of Jane Doe"


def picture(path: Path, seed: int, side: int = 40) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def record(number: int, image: str | None, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer}]
    return {"id": f"id-{number}", "conversations": turns, **({"image": image} if image else {}), **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        picture(images / f"secret_{number}.png", number, 40 + 8 * number)
    Image.open(images / "secret_0.png").save(images / "copy.bmp")  # the same pixels in another format
    records = [
        record(0, "secret_0.png", SECRET, source="a"),
        record(1, "secret_1.png", SECRET.lower() + " ", source="a", colour="red"),
        record(2, "copy.bmp", "Benign.", source="b"),
        record(2, None, "Another."),
        record(4, "missing.png", "Benign.", source="b"),
        record(5, "secret_2.png", " ", source="b"),
        record(6, None, "Text.", meta={"stage": "pT2"}),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def census_of(folder: Path, **options: Any) -> Census:
    return take_census(folder / "data.json", folder / "images", **options)


def test_records_are_counted_and_what_would_be_refused_is_named(folder: Path) -> None:
    found = json_of(census_of(folder))
    assert (found["records"], found["refused"], found["images"], found["without_image"]) == (7, 3, 3, 1)
    assert found["rules"] == {"duplicate-id": 1, "missing-file": 1, "empty-answer": 1}
    assert found["duplicate_ids"] == 1
    assert found["sources"]["a"] == {"records": 2, "images": 2}
    assert found["unknown_keys"] and found["kept_meta_keys"]
    kept = json_of(census_of(folder, duplicate_ids="keep"))
    assert kept["refused"] == 2 and kept["duplicate_ids"] == 1


def test_records_are_counted_by_the_layout_that_each_is_of(folder: Path) -> None:
    assert json_of(census_of(folder))["layouts"] == {"llava": 7}
    asked = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    caption = {"image": "secret_0.png", "caption": "A caption."}
    lines = [json.dumps(one) for one in (record(8, None, "Text."), asked, caption, {"nothing": 1})]
    (folder / "data.json").unlink()
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    census = take_census(folder / "mixed.jsonl", folder / "images")
    assert json_of(census)["layouts"] == {"llava": 1, "messages": 1, "captions": 1, "": 1}
    assert "layout (none fits)" in text_of_census(census)


def test_what_comes_again_is_found_by_words_and_by_pixels(folder: Path) -> None:
    repeated = json_of(census_of(folder))["repeated"]
    assert repeated["answers"] == {"repeated": 1, "most": [{"times": 2, "size": len(SECRET), "first": 0}]}
    assert repeated["pictures"]["repeated"] == 1 and repeated["pictures"]["most"][0]["first"] == 0
    assert repeated["conversations"]["repeated"] == 0  # the same words about another picture are no repetition


def test_it_does_not_depend_on_how_the_records_are_divided(folder: Path) -> None:
    whole = census_of(folder)
    for options in ({"partition_size": 2}, {"partition_size": 3, "workers": 2}):
        divided = census_of(folder, **options)
        assert json_of(divided) == json_of(whole)
        assert page_of(divided) == page_of(whole)


def test_page_and_figures_hold_pictures_but_no_words_names_or_ids(folder: Path) -> None:
    census = census_of(folder)
    page = page_of(census)
    assert len(re.findall("data:image/jpeg;base64,", page)) == 3 and "<svg" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    for text in (page, json.dumps(json_of(census)), text_of_census(census)):
        for word in (SECRET, "Benign", "secret_", "missing.png", "id-2", "pT2"):
            assert word not in text


def test_what_comes_from_the_data_is_escaped_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        json.dumps([record(0, None, "A", source="<script>alert(1)</script>\x1b[2J\u202e")])
    )
    page = page_of(take_census(tmp_path / "data.json", tmp_path))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in page and "\\x1b[2J\\u202e" in page


def test_bins_are_ordered_and_hold_their_values() -> None:
    lows = [bin_of(value) for value in range(5000)]
    assert lows == sorted(lows) and all(low <= value < 1.26 * low + 1 for value, low in enumerate(lows))
    assert lows[:9] == list(range(9))


def test_the_command_writes_page_and_figures_and_counts_tokens_of_a_training(
    folder: Path, repo_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    places = ["--data", str(folder / "data.json"), "--images", str(folder / "images"), "--workers", "1"]
    written = ["--html", str(folder / "c.html"), "--json", str(folder / "c.json")]
    of_yaml = ["--yaml", "yamls/demo/finetune.yaml", "train_loader.dataset.max_seq_len=20"]
    assert main(["census", *places, *written, *of_yaml]) == 0
    assert "would be refused" in capsys.readouterr().out
    found = json.loads((folder / "c.json").read_text())
    assert found["truncated"] == 4 and found["histograms"]["tokens"]["bins"]
    assert (folder / "c.html").read_text().startswith("<!doctype html>")


def test_nothing_to_read_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[]", "[{"):
        (tmp_path / "data.json").write_text(text)
        assert main(["census", "--data", str(tmp_path / "data.json"), "--images", str(tmp_path)]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
