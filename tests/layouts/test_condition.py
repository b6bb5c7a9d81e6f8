"""Rows are taken by what they say, or what a table beside them says; what nothing is known of is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_files import image_folder, write_table

from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.layouts.condition import Condition, ConditionError
from composer_path.shards.view import ShardView

ROWS = [
    {"caption": "Colon.", "image_path": "a.png", "subset": "quilt", "height": "32"},
    {"caption": "Lung.", "image_path": "b.png", "subset": "pubmed", "height": "500.0"},
    {"caption": "Skin.", "image_path": "c.png", "subset": "laion", "height": ""},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = image_folder(tmp_path / "set")
    write_table(images / "lookup.csv", ROWS)
    predictions = [
        {"Filename": "some/where/a.png", "Any Impairment": "0.0", "persons": "0"},
        {"Filename": "b.png", "Any Impairment": "1", "persons": "0"},
    ]
    write_table(images / "predictions.csv", predictions)
    return images


def taken(folder: Path, *where: str, **options: Any) -> tuple[list[str], dict[str, int]]:
    out = folder.parent / "out"
    summary = convert(folder / "lookup.csv", folder, out, where=where, ids="keep", overwrite=True, **options)
    view = ShardView(out)
    samples = [sample for number in range(len(view.shards)) for sample in view.samples(number)]
    return [one.conversation.turns[1].text for one in samples], summary.left_out


@pytest.mark.parametrize("options", [{}, {"partition_size": 1, "workers": 2}])
def test_a_join_takes_what_a_table_says_and_leaves_out_what_it_does_not_know(
    folder: Path, options: dict[str, Any]
) -> None:
    table = folder / "predictions.csv"
    texts, left_out = taken(folder, f"{table}:any_impairment=0", **options)
    assert texts == ["Colon."]
    assert left_out == {"--where any_impairment": 1, "--where any_impairment: not in the table": 1}


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ("subset=quilt|pubmed", ["Colon.", "Lung."]),
        ("Subset!=laion", ["Colon.", "Lung."]),
        ("height>=448", ["Lung."]),
        ("height=32.0", ["Colon."]),
    ],
)
def test_a_condition_of_a_row_is_compared_as_numbers_where_both_are(folder: Path, where: str, texts: list[str]) -> None:
    assert taken(folder, where)[0] == texts


def test_no_row_is_an_error_that_says_why(folder: Path) -> None:
    with pytest.raises(ConvertError, match="there must be a record to write, none is wanted"):
        taken(folder, "subset=openpath")


@pytest.mark.parametrize("text", ["subset", "=x", "a=", "a==b", "__import__('os')", "height<tall", "x.csv:=3"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConditionError, match="--where"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([{"Filename": "a.png", "x": "0"}], "must have the column 'any_impairment', found none among its 2"),
        ([{"Name": "a.png", "any_impairment": "0"}], "must name pictures in one column"),
        (
            [{"Filename": "a.png", "any_impairment": "0"}, {"Filename": "x/a.png", "any_impairment": "1"}],
            "found several that differ",
        ),
        (None, "must be a table on this disk, found No such file"),
    ],
)
def test_a_table_that_cannot_decide_is_refused_before_the_first_record(
    table: list[dict[str, str]] | None, message: str, folder: Path
) -> None:
    path = folder / "other.csv"
    if table is not None:
        write_table(path, table)
    with pytest.raises(ConvertError, match=message):
        taken(folder, f"{path}:any_impairment=0")


def test_another_table_is_another_conversion(folder: Path) -> None:
    taken(folder, f"{folder / 'predictions.csv'}:persons=0")
    write_table(folder / "predictions.csv", [{"Filename": "a.png", "persons": "0"}])
    where = (f"{folder / 'predictions.csv'}:persons=0",)
    with pytest.raises(ConvertError, match="found another conversion"):
        convert(folder / "lookup.csv", folder, folder.parent / "out", where=where, ids="keep", resume=True)
