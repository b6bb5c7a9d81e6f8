"""Files of each public layout become shards that say what the files say."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_files import CAPTION, COLORS, JSON_FILES, TABLES, image_folder, png, turns, write_file
from PIL import Image
from tiny_slide import tiny_slide_levels

from composer_path.conversion.convert import convert
from composer_path.conversion.summary import ConvertSummary
from composer_path.layouts.registry import LAYOUTS, SET_NAMES
from composer_path.shards.view import ShardView, StoredSample

ASKED = ["<image>\nWhich tissue?", "Colon."]
CAPTIONED = ["<image>\nDescribe this image.", CAPTION]
CHOSEN = ["<image>\nWhich tissue?\nA. Colon\nB. Lung", "B. Lung"]
PMC_CHOSEN = ["<image>\nWhich tissue?\nA. Colon\nB. Lung\nC. Skin\nD. Liver", "B. Lung"]

EXPECTED: dict[str, list[str]] = {
    **dict.fromkeys(("llava.json", "pathgen-instruct.json", "sharegpt.json", "messages.jsonl", "openai.jsonl"), ASKED),
    **dict.fromkeys(("role-conversations.json", "trl.json", "pathvqa.json"), ASKED),
    **dict.fromkeys(("captions.json", "pmc-oa.jsonl", "captions.csv", "reports.tsv", "quilt-1m.csv"), CAPTIONED),
    **dict.fromkeys(("pathgen.json", "pathgen-readme.json", "arch.json", "reg.json"), CAPTIONED),
    **dict.fromkeys(("pathmmu.json", "vlmevalkit.tsv"), CHOSEN),
    "pmc-vqa.csv": PMC_CHOSEN,
    "reg-chains.json": ["<image>\nWhich organ?", "Colon.", "Is it malignant?", "No."],
}
OPTIONS: dict[str, dict[str, Any]] = {"pathmmu.json": {"where": ["split=val"]}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("pictures"))


def converted(path: Path, images: Path, out: Path, **options: Any) -> tuple[ConvertSummary, list[StoredSample]]:
    summary = convert(path, images, out, ids="keep", **options)
    view = ShardView(out)
    return summary, [sample for number in range(len(view.shards)) for sample in view.samples(number)]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_file_of_each_layout_is_expected_something_of() -> None:
    assert EXPECTED.keys() == JSON_FILES.keys() | TABLES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_a_layout_becomes_what_it_says(name: str, images: Path, tmp_path: Path) -> None:
    path = write_file(tmp_path, name)
    summary, samples = converted(path, images, tmp_path / "out", **OPTIONS.get(name, {}))
    assert [turn.text for turn in samples[0].conversation.turns] == EXPECTED[name]
    num_rows = len(TABLES.get(name) or JSON_FILES[name])
    assert (len(samples), summary.rejected, summary.images) == (num_rows, 0, num_rows)
    if not name.startswith("pathgen"):
        assert pixels(samples[0].images[0])[0, 0].tolist() == list(COLORS["a.png"])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layout_that_is_named_reads_what_auto_reads(name: str, images: Path, tmp_path: Path) -> None:
    stem = name.split(".")[0]
    layout = {"role-conversations": "messages", "pathgen-readme": "pathgen", "reports": "captions"}.get(stem, stem)
    path = write_file(tmp_path, name)
    _, auto = converted(path, images, tmp_path / "auto", **OPTIONS.get(name, {}))
    _, named = converted(path, images, tmp_path / "named", layout=layout, **OPTIONS.get(name, {}))
    assert layout in LAYOUTS.keys() | SET_NAMES.keys()
    assert [(one.conversation, one.images, one.metadata) for one in named] == [
        (one.conversation, one.images, one.metadata) for one in auto
    ]


def test_a_region_of_pathgen_lies_at_its_position_of_level_0(images: Path, tmp_path: Path) -> None:
    _, (sample,) = converted(write_file(tmp_path, "pathgen.json"), images, tmp_path / "out")
    found, slide = pixels(sample.images[0]), tiny_slide_levels()[0]
    assert found.shape == (672, 672, 3)
    assert (found[: 48 - 8, : 80 - 16] == slide[8:, 16:]).all()
    assert sample.metadata["slide"] == "TCGA-AA-3844-01Z-00-DX1"
    assert sample.metadata["patient"] == "TCGA-AA-3844"


def test_a_system_message_and_sources_are_kept(images: Path, tmp_path: Path) -> None:
    for name in ("openai.jsonl", "sharegpt.json"):
        _, (sample,) = converted(write_file(tmp_path, name), images, tmp_path / name.split(".")[0])
        assert sample.conversation.system == "Be brief."
    summary, samples = converted(write_file(tmp_path, "quilt-1m.csv"), images, tmp_path / "quilt")
    assert set(summary.sources) == {"quilt-1m/quilt", "quilt-1m/pubmed"}
    assert [one.metadata.get("magnification") for one in samples] == ["1.0", None]


def test_keys_that_a_layout_does_not_read_are_counted(images: Path, tmp_path: Path) -> None:
    summary, _ = converted(write_file(tmp_path, "pathgen.json"), images, tmp_path / "out")
    assert sum(summary.unknown_keys.values()) == 1


def test_prompts_are_chosen_by_the_caption_alone(images: Path, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": f"Caption {number}."} for number in range(12)]
    given = {"caption_prompt": ["What is this?", "Describe it."]}

    def asked(rows: list[dict[str, str]], name: str) -> dict[str, str]:
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        _, samples = converted(tmp_path / f"{name}.json", images, tmp_path / name, **given)
        return {one.conversation.turns[1].text: one.conversation.turns[0].text for one in samples}

    first = asked(rows, "first")
    assert set(first.values()) == {"<image>\nWhat is this?", "<image>\nDescribe it."}
    assert asked(rows[::-1], "second") == first


def test_records_of_several_layouts_in_one_file_are_each_read_by_their_keys(images: Path, tmp_path: Path) -> None:
    names = ("llava.json", "messages.jsonl", "captions.json", "pathgen.json", "pathvqa.json", "reg-chains.json")
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([JSON_FILES[name][0] for name in names]))
    _, samples = converted(path, images, tmp_path / "out")
    assert [[turn.text for turn in one.conversation.turns] for one in samples] == [EXPECTED[name] for name in names]


@pytest.mark.parametrize("name", ["captions.csv", "captions.json", "arch.json", "messages.jsonl"])
def test_partitions_workers_and_resuming_give_the_same_samples(name: str, images: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    texts = [f"Text {number},\n{'x' * number}" for number in range(7)]
    if name == "captions.csv":
        path.write_text("image,caption\n\n" + "".join(f'a.png,"{text}"\n' for text in texts))
    elif name == "captions.json":
        path.write_text(json.dumps([{"image": "a.png", "caption": text} for text in texts]))
    elif name == "arch.json":
        rows = {
            str(i): {"figure_id": "1", "letter": "A", "caption": one, "uuid": "0f-a"} for i, one in enumerate(texts)
        }
        path.write_text(json.dumps(rows, indent=1))
    else:
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": one}]} for one in texts
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    _, whole = converted(path, images, tmp_path / "whole")
    _, cut = converted(path, images, tmp_path / "cut", partition_size=2, workers=2)
    (tmp_path / "cut" / "index.json").unlink()
    summary, resumed = converted(path, images, tmp_path / "cut", partition_size=2, resume=True)
    told = [[(one.id, one.conversation, one.images) for one in samples] for samples in (whole, cut, resumed)]
    assert told[0] == told[1] == told[2]
    assert [one.conversation.turns[1].text for one in whole] == texts
    assert summary.resumed == 4


def test_each_option_of_a_turn_goes_on_with_it() -> None:
    from composer_path.layouts.reading import Reading

    given = [{**turn, "loss": False} for turn in turns("role", "content", "user", "assistant")]
    record, _ = Reading().record({"messages": given, "images": ["a.png"]}, 0)
    assert [turn["loss"] for turn in record["conversations"]] == [False, False]


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("kind", ["questions", "conversations", "messages", "captions"])
def test_a_parquet_file_with_an_image_column_is_read(kind: str, images: Path, tmp_path: Path) -> None:
    picture = {"bytes": png(COLORS["a.png"]), "path": "somewhere/a.png"}
    rows: dict[str, dict[str, Any]] = {
        "questions": {"image": picture, "question": "Which tissue?", "answer": "Colon."},
        "conversations": {"image": picture, "conversations": turns()},
        "messages": {"images": [picture], "messages": turns("role", "content", "user", "assistant")},
        "captions": {"image": {**picture, "path": None}, "text": CAPTION},
    }
    path = parquet(tmp_path / "train-00000.parquet", [rows[kind]])
    _, (sample,) = converted(path, images, tmp_path / "out")
    assert [turn.text for turn in sample.conversation.turns] == (CAPTIONED if kind == "captions" else ASKED)
    assert list(sample.images) == [png(COLORS["a.png"])]


def test_a_parquet_file_is_cut_at_any_row(images: Path, tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png((number, 0, 0)), "path": "same.png"}, "question": f"{number}?", "answer": "Yes."}
        for number in range(50)
    ]
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=20)
    _, whole = converted(path, images, tmp_path / "whole")
    _, cut = converted(path, images, tmp_path / "cut", partition_size=7, workers=2)
    assert [pixels(one.images[0])[0, 0, 0] for one in whole] == list(range(50))
    assert [(one.conversation, one.images) for one in cut] == [(one.conversation, one.images) for one in whole]
