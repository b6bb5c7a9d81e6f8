"""An export takes the place of an earlier one and of nothing else, however it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composer_path.run import published
from composer_path.run.published import WRITTEN, publish
from composer_path.storage.lock import AnotherAtWork, locked

ADAPTER = "adapters/language_model/adapter_model.safetensors"
EARLIER = {"config.json": "1", "model-00001-of-00002.safetensors": "1", "README.md": "1", ADAPTER: "1"}
NEW = {"config.json": "2", "model.safetensors": "2", "README.md": "2"}


class Killed(BaseException):
    """Ends a process at once, as far as a test can: nothing is cleaned up behind it."""


def writer(files: dict[str, str]) -> Callable[[Path], None]:
    def write(new: Path) -> None:
        for name, text in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text)

    return write


def content(folder: Path) -> dict[str, str]:
    """All files by name, but for the list."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != WRITTEN]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An earlier export, its evaluation, and what somebody put beside it."""
    publish(tmp_path, "llava-hf", writer(EARLIER))
    (tmp_path / "evaluation.json").write_text("1")
    (tmp_path / "model_notes.txt").write_text("mine")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x").write_text("mine")
    return tmp_path


MINE = {"model_notes.txt": "mine", "models/x": "mine"}


def test_an_export_takes_the_place_of_the_earlier_ones_files_and_of_no_others(folder: Path) -> None:
    publish(folder, "llava-hf", writer(NEW))
    assert content(folder) == NEW | MINE
    assert not (folder / "adapters").exists()
    assert json.loads((folder / WRITTEN).read_text())["files"] == sorted(NEW)


def steps_of(monkeypatch: pytest.MonkeyPatch, kill_at: int) -> Callable[[], int]:
    """Have a process die before its rename or removal of this number; returns what counts them."""
    done = 0

    def counted(original: Any) -> Any:
        def step(*args: Any, **keywords: Any) -> Any:
            nonlocal done
            done += 1
            if done == kill_at:
                raise Killed
            return original(*args, **keywords)

        return step

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(published.shutil, "rmtree", lambda *args, **keywords: None)
    return lambda: done


def test_after_a_kill_at_any_step_the_same_export_goes_through_and_nothing_else_is_lost(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kills = 0
    for kill_at in range(1, 100):
        place = tmp_path_factory.mktemp("killed") / "out"
        shutil.copytree(folder, place)
        with pytest.MonkeyPatch.context() as patch:
            count = steps_of(patch, kill_at)
            try:
                publish(place, "llava-hf", writer(NEW))
            except Killed:
                kills += 1
            if count() < kill_at:
                break
        there = {name: text for name, text in content(place).items() if ".unfinished/" not in name}
        if "config.json" in there:  # who reads it finds one model, whole
            whole = NEW if there["config.json"] == "2" else EARLIER
            assert {name: text for name, text in there.items() if name in whole} == whole
        assert {name: there[name] for name in MINE} == MINE
        publish(place, "llava-hf", writer(NEW))
        assert content(place) == NEW | MINE
    assert kills >= 8


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ("config.json", "config.json"),
        ("README.md", "README.md"),
        ("adapters", ADAPTER),  # a file where a folder is to be
        (ADAPTER, ADAPTER),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_files_that_no_export_wrote_are_refused_and_left(tmp_path: Path, theirs: str, found: str) -> None:
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).write_text("mine")
    with pytest.raises(ValueError, match=f"found {found}; choose another place"):
        publish(tmp_path, "composer_path", writer(EARLIER), unlisted=lambda name: True)
    assert content(tmp_path) == {theirs: "mine"} and not (tmp_path / WRITTEN).exists()


def test_a_link_to_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapters").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"found {ADAPTER}; choose another place"):
        publish(tmp_path / "out", "peft", writer(EARLIER))
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="found a link that leads nowhere; choose another place"):
        publish(tmp_path / "nowhere", "peft", writer(EARLIER))


def test_a_whole_model_and_another_shape_never_take_each_others_place(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be empty or hold an earlier export, found one in the shape 'llava-hf'"):
        publish(folder, "composer_path", writer(NEW))
    publish(tmp_path / "model", "composer_path", writer(NEW))
    with pytest.raises(ValueError, match="in a shape of --as, found a whole model of ours; choose another place"):
        publish(tmp_path / "model", "language-model", writer(EARLIER))
    assert content(tmp_path / "model") == NEW


@pytest.mark.parametrize("name", ["../precious", "/etc/hostname", "models/x", "models/../model_notes.txt", "linked/x"])
def test_a_list_that_names_what_lies_elsewhere_is_no_leave_to_remove_it(folder: Path, name: str) -> None:
    (folder / "linked").symlink_to(folder / "models")
    (folder.parent / "precious").write_text("mine")
    said = json.loads((folder / WRITTEN).read_text())
    (folder / WRITTEN).write_text(json.dumps(said | {"files": [*said["files"], name]}))
    publish(folder, "llava-hf", writer(NEW))
    assert (folder.parent / "precious").read_text() == "mine"
    assert MINE.items() <= content(folder).items()


def test_two_exports_at_once_are_told_so(folder: Path) -> None:
    before = content(folder)
    with locked(folder, "export", ""), pytest.raises(AnotherAtWork, match="one export at a time"):
        publish(folder, "llava-hf", writer(NEW))
    assert {name: text for name, text in content(folder).items() if name != ".lock"} == before
