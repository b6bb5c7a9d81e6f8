"""A run goes on from its newest whole checkpoint: damage of any kind is seen and named, and nothing is lost by it."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_checkpoints import fake_checkpoint, old_checkpoint

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.newest import named, newest_whole


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Checkpoints of steps 2 and 4."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (2, 4):
        fake_checkpoint(folder, step)
    return folder


def newest(folder: CheckpointFolder) -> str:
    found = newest_whole(folder)
    assert found is not None and found.path.parent == folder.path
    return found.path.name


def test_the_newest_is_taken_by_its_step_not_by_its_name(folder: CheckpointFolder) -> None:
    for step in (10, 9):
        fake_checkpoint(folder, step)
    assert newest(folder) == "ep0-ba10"


def test_an_empty_or_missing_folder_has_none(tmp_path: Path) -> None:
    assert newest_whole(CheckpointFolder(tmp_path)) is None
    assert newest_whole(CheckpointFolder(tmp_path / "not_there")) is None


# --- damage ----------------------------------------------------------------------------------------------------------

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(data))
    data[at] ^= 1 << 6
    path.write_bytes(data)


def take_anothers(path: Path) -> None:
    shutil.copy(path.parent.parent / "ep0-ba2" / path.name, path)


def link_away(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to("../moved")


DAMAGE = {
    "truncated": truncate,
    "one bit flipped": flip_a_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "of another step": take_anothers,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    folder: CheckpointFolder, file: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder.path / "ep0-ba4" / file
    DAMAGE[kind](path)
    if kind == "removed" and file == "manifest.json":
        (folder.path / "ep0-ba4" / "latest_note").touch()  # a folder with other things in it isn't an unfinished one
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == "ep0-ba2"
    [line] = [record.getMessage() for record in caplog.records]
    assert f"{folder.path}/ep0-ba4 is damaged: " in line and "an earlier one is taken" in line
    assert file in line or file == "manifest.json"
    assert (folder.path / "ep0-ba4").exists()  # nothing is thrown away


def test_links_in_place_of_files_are_refused(folder: CheckpointFolder) -> None:
    link_away(folder.path / "ep0-ba4" / "__0_0.distcp")
    assert newest(folder) == "ep0-ba2"


def rename(path: Path) -> None:
    """An old one gets the name of a step to come: by it, it would go before all that are written later."""
    (path.parent / "ep0-ba2").rename(path.parent / "ep3-ba90")


def copy(path: Path) -> None:
    shutil.copytree(path.parent / "ep0-ba2", path.parent / "ep3-ba90")


def put_elsewhere(path: Path) -> None:
    shutil.copytree(path, path.parent.parent / "elsewhere")
    (path.parent / "ep3-ba90").symlink_to("../elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, r"it is that of ep0-ba2, .* name it ep0-ba2 again"),
        (copy, r"it is that of ep0-ba2, .* name it ep0-ba2 again"),
        (put_elsewhere, r"it is a link to '\.\./elsewhere'; bring the folder itself here"),
    ],
)
def test_a_name_that_isnt_its_own_is_said_and_decides_nothing(
    folder: CheckpointFolder, change: Callable[[Path], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder.path / "ep0-ba4")
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == "ep0-ba4"
    assert re.search(f"ep3-ba90 is damaged: .*{words}", caplog.records[-1].getMessage())
    assert "ep3-ba90" not in folder.manifests() and os.path.lexists(folder.path / "ep3-ba90")  # rotation leaves it


def test_a_link_in_a_checkpoints_place_is_written_over(folder: CheckpointFolder) -> None:
    (folder.path / "ep0-ba6").symlink_to("../gone")
    fake_checkpoint(folder, 6)
    assert newest(folder) == "ep0-ba6"


@pytest.mark.parametrize("link", ["latest", "best"])
def test_a_folder_in_a_links_place_is_refused_before_anything_is_trained(folder: CheckpointFolder, link: str) -> None:
    (folder.path / "latest").unlink()
    shutil.copytree(folder.path / "ep0-ba4", folder.path / link)  # as `cp -L` does it
    with pytest.raises(CheckpointError, match=f"{link}: must be a link to a checkpoint beside it, found a folder"):
        newest_whole(folder)


@pytest.mark.parametrize("file", FILES[:3])
def test_every_length_and_every_bit_is_looked_at(folder: CheckpointFolder, file: str) -> None:
    path = folder.path / "ep0-ba4" / file
    whole, at_random = path.read_bytes(), random.Random(file)
    for size in sorted(at_random.sample(range(len(whole)), 50)):
        path.write_bytes(whole[:size])
        assert newest(folder) == "ep0-ba2", size
    for bit in at_random.sample(range(8 * len(whole)), 200):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert newest(folder) == "ep0-ba2", bit
    path.write_bytes(whole)
    assert newest(folder) == "ep0-ba4"


def test_damaged_ones_alone_are_an_error_never_a_start_from_0(folder: CheckpointFolder) -> None:
    for step in (2, 4):
        truncate(folder.path / f"ep0-ba{step}" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        newest_whole(folder)
    message = str(caught.value)
    assert "ep0-ba4 is damaged: __0_0.distcp has 1,000 bytes instead of 2,000" in message and "ep0-ba2 is" in message
    assert "no whole checkpoint is left" in message and "another run_name" in message


# --- what a kill leaves ----------------------------------------------------------------------------------------------


def test_unfinished_ones_are_cleared_with_a_line(folder: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    staged = folder.staging("ep0-ba6")
    (staged / "__0_0.distcp").write_bytes(b"half")
    old_checkpoint(folder, 8)
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == "ep0-ba4"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" was not complete")[0] for line in lines] == [
        f"checkpoint {folder.path}/ep0-ba6",
        f"checkpoint {folder.path}/ep0-ba8",
    ]
    assert {path.name for path in folder.path.iterdir()} == {"ep0-ba2", "ep0-ba4", "latest"}


def test_while_the_run_may_be_at_work_nothing_is_cleared(folder: CheckpointFolder) -> None:
    staged = folder.staging("ep0-ba6")
    found = newest_whole(folder, clear=False)
    assert found is not None and found.step == 4 and staged.exists()


def broken_link(folder: CheckpointFolder) -> None:
    folder.point("latest", "ep0-ba99")


def no_link(folder: CheckpointFolder) -> None:
    (folder.path / "latest").unlink()


def older_link(folder: CheckpointFolder) -> None:
    folder.point("latest", "ep0-ba2")


@pytest.mark.parametrize("change", [broken_link, no_link, older_link])
def test_the_link_decides_nothing(folder: CheckpointFolder, change: Callable[[CheckpointFolder], None]) -> None:
    change(folder)
    assert newest(folder) == "ep0-ba4"


# --- others' ---------------------------------------------------------------------------------------------------------


def test_a_link_to_another_runs_checkpoint_is_refused(folder: CheckpointFolder, tmp_path: Path) -> None:
    fake_checkpoint(CheckpointFolder(tmp_path / "other" / "checkpoints"), 9)
    folder.point("latest", "../other/checkpoints/ep0-ba9")
    with pytest.raises(CheckpointError, match=r"latest: must name a checkpoint beside it, found '\.\./other/.*ba9'"):
        newest_whole(folder)


def test_checkpoints_of_two_runs_in_one_folder_are_refused(folder: CheckpointFolder) -> None:
    fake_checkpoint(folder, 6, run_id="another_run")
    with pytest.raises(CheckpointError, match="holds checkpoints of 2 runs, such as ep0-ba4, ep0-ba6"):
        newest_whole(folder)


# --- by name ---------------------------------------------------------------------------------------------------------


def test_one_can_be_named_also_by_a_link(folder: CheckpointFolder) -> None:
    assert named(folder.path / "latest").path == named(str(folder.path / "ep0-ba4")).path == folder.path / "ep0-ba4"


def test_a_named_one_that_is_damaged_or_not_there_is_refused(folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at '.*ep0-ba5'; name one"):
        named(folder.path / "ep0-ba5")
    flip_a_bit(folder.path / "ep0-ba4" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"ep0-ba4 is damaged: __0_0.distcp was changed"):
        named(folder.path / "latest")
