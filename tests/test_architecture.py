"""What docs/architecture.md says of the way from the command to a step's loss is what runs."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny_run import convert_shards, tiny_overrides

from composer_path.train import main

ONE_STEP = (
    "trainer={max_duration: 1ba, save_interval: null, autoresume: false}",
    "trainer.eval_interval=1ep",
    "eval_loader=null",
    "callbacks=null",
    "model.projector.weights=null",
)


@pytest.fixture(scope="module")
def tables(repo_root: Path) -> tuple[list[str], set[str]]:
    """The files of the road in their order, and those that are asked on the way."""
    text = (repo_root / "docs" / "architecture.md").read_text(encoding="utf-8")
    road, rest = text.split("What a step asks on the way")
    asked: set[str] = set()
    for row in re.findall(r"^\| (`.*`) \|", rest.split("A test traces")[0], re.MULTILINE):
        for folder, names in re.findall(r"`([\w/]+)(?:\{([\w,]+)\}|)[\w]*`", row):
            places = [f"{folder}{name}.py" for name in names.split(",")] if names else [folder]
            for place in places:
                path = repo_root / "composer_path" / place.removesuffix(".py")
                asked |= {str(file) for file in path.glob("*.py")} if path.is_dir() else {str(path) + ".py"}
    return re.findall(r"^\| `(\S+\.py)` \|", road, re.MULTILINE), asked


def test_the_road_of_a_loss_is_twelve_files_and_1900_lines_at_most(repo_root: Path, tables: Any) -> None:
    road, _ = tables
    lines = [len((repo_root / file).read_text(encoding="utf-8").splitlines()) for file in road]
    assert 10 <= len(road) <= 12 and sum(lines) <= 1900, dict(zip(road, lines, strict=True))


def test_a_step_runs_the_files_of_the_road_and_asks_only_those_that_are_named(
    repo_root: Path, tables: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    road, asked = tables
    shards = convert_shards(tmp_path_factory.getbasetemp() / "shards")
    package, seen = str(repo_root / "composer_path"), set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        runs = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # a function, not the body of a module or class
        if event == "call" and runs and frame.f_code.co_filename.startswith(package):
            seen.add(frame.f_code.co_filename)

    overrides = [*tiny_overrides("finetune", shards, tmp_path_factory.mktemp("step")), *ONE_STEP]
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        assert main([str(repo_root / "yamls" / "demo" / "finetune.yaml"), *overrides]) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    on_road = {str(repo_root / file) for file in road if file != "train.py"}  # the door, whose one line was run here
    assert on_road <= seen
    assert sorted(file.removeprefix(package) for file in seen - on_road - asked) == []
