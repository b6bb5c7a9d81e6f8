"""One conversion a place, and a published set that stays until another can take its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from composer_path.conversion.convert import convert, merge
from composer_path.conversion.rejected_file import ConvertError
from composer_path.shards.check import check_shards
from composer_path.shards.index import held
from composer_path.shards.select import select_samples
from composer_path.shards.view import ShardView
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Folder

REPO = Path(__file__).resolve().parents[2]


def write(folder: Path, answer: str, count: int = 8) -> Path:
    """Records of one image each, in a file called after their answer."""
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 100, 100)).save(folder / "imgs" / f"{number}.png")
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"{answer} {number}"}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / f"{answer}.json").write_text(json.dumps(records))
    return folder / f"{answer}.json"


def run(data: Path, out: Path, **options: Any) -> Any:
    return convert(data, data.parent / "imgs", out, partition_size=3, ids="keep", **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(out: Path) -> list[str]:
    view = ShardView(out)
    return [sample.conversation.turns[1].text for n in range(len(view.shards)) for sample in view.samples(n)]


# --------------------------------------------------------------------------------------------- one at a time

SLOW = """
import sys, time
from composer_path.conversion import partition
from composer_path.conversion.convert import convert
original = partition._Conversion.run
def slow(self):
    print("at work", flush=True)
    time.sleep(float(sys.argv[4]))
    return original(self)
partition._Conversion.run = slow
more = {"part": sys.argv[5]} if len(sys.argv) > 5 else {}
convert(*sys.argv[1:4], partition_size=3, ids="keep", **more)
"""


def at_work(data: Path, out: Path, seconds: float, *part: str) -> subprocess.Popen[str]:
    """A conversion in a process of its own, begun."""
    words = [sys.executable, "-c", SLOW, str(data), str(data.parent / "imgs"), str(out), str(seconds), *part]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    return process


def test_a_second_writer_is_refused_by_name_whatever_it_is_and_the_first_ends_whole(tmp_path: Path) -> None:
    first, other, out = write(tmp_path, "first"), write(tmp_path, "other", 5), tmp_path / "out"
    run(other, tmp_path / "whole")
    process = at_work(first, out, 1.0)
    refused = r"one conversion at a time, found another one at work \(process \d+ on .+\); wait for it"
    for options in ({}, {"overwrite": True}, {"resume": True}, {"part": "1/2"}):
        started = time.monotonic()
        with pytest.raises(StorageError, match=refused):
            run(other, out, **options)
        assert time.monotonic() - started < 2
    with pytest.raises(StorageError, match=refused):
        merge(out)
    with pytest.raises(ValueError, match=r"must be empty, found files"):
        select_samples(ShardView(tmp_path / "whole"), str(out), num_samples=2)
    assert process.wait(60) == 0
    assert check_shards(ShardView(out)).problems == []
    assert answers(out) == [f"first {number}" for number in range(8)]
    assert not (out / ".lock").exists()


def test_a_kill_leaves_the_place_free_and_what_it_leaves_is_in_nobodys_way(tmp_path: Path) -> None:
    data, out = write(tmp_path, "first"), tmp_path / "out"
    process = at_work(data, out, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / ".lock").exists()
    (out / "conversion.json").unlink()
    run(data, out)  # an empty place, but for the lock
    assert check_shards(ShardView(out)).problems == []
    assert not (out / ".lock").exists()


def test_parts_are_converted_side_by_side_and_the_same_one_is_refused(tmp_path: Path) -> None:
    data, out = write(tmp_path, "first"), tmp_path / "out"
    process = at_work(data, out, 1.0, "1/2")
    run(data, out, part="2/2")
    for options in ({"part": "1/2"}, {"part": "1/2", "resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match="one conversion at a time"):
            run(data, out, **options)
    with pytest.raises(StorageError, match="one conversion at a time"):
        merge(out)
    assert process.wait(60) == 0
    merge(out)
    assert check_shards(ShardView(out)).problems == []


def test_a_choice_of_samples_holds_its_place_too(tmp_path: Path) -> None:
    run(write(tmp_path, "first"), tmp_path / "whole")
    with held(Folder(tmp_path / "out")), pytest.raises(StorageError, match="one conversion at a time"):
        select_samples(ShardView(tmp_path / "whole"), str(tmp_path / "out"), num_samples=2)
    select_samples(ShardView(tmp_path / "whole"), str(tmp_path / "out"), num_samples=2)


# ------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["part-00000", "part-00000/shard.00000.mds", "index.json", ".replacement", "dangling"])
@pytest.mark.parametrize("option", ["overwrite", "resume", "part", "merge"])
def test_a_link_in_the_place_is_refused_and_nothing_behind_it_changes(tmp_path: Path, name: str, option: str) -> None:
    data, out, outside = write(tmp_path, "first"), tmp_path / "out", tmp_path / "outside"
    run(data, out)
    outside.mkdir()
    if (out / name).exists():
        (out / name).rename(outside / "kept")
    else:
        (outside / "kept").mkdir()
    (out / name).symlink_to(tmp_path / "nowhere" if name == "dangling" else outside / "kept")
    before, inside = files_of(outside), files_of(out)
    with pytest.raises(StorageError, match=f"must hold no symbolic link, found '{name}'"):
        merge(out) if option == "merge" else run(data, out, **{option: "1/1" if option == "part" else True})
    assert (files_of(outside), files_of(out)) == (before, inside)
    assert (out / name).is_symlink()


def test_a_link_to_the_place_itself_is_the_place(tmp_path: Path) -> None:
    first, other = write(tmp_path, "first"), write(tmp_path, "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    run(first, tmp_path / "link")
    run(other, tmp_path / "link", overwrite=True)
    assert answers(tmp_path / "out")[0] == "other 0"
    with held(Folder(tmp_path / "link")), pytest.raises(StorageError, match="one conversion at a time"):
        run(other, tmp_path / "out", overwrite=True)


# ------------------------------------------------------------------------------------------- taking a set's place


def test_a_full_disk_leaves_the_published_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other, out = write(tmp_path, "first"), write(tmp_path, "other"), tmp_path / "out"
    run(first, out)
    before, original = files_of(out), Folder.write

    def full(self: Folder, name: str, *rest: Any, **more: Any) -> None:
        if name.startswith("part-00001"):
            raise OSError(28, "No space left on device")
        original(self, name, *rest, **more)

    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(other, out, overwrite=True)
    assert {name: data for name, data in files_of(out).items() if not name.startswith(".replacement")} == before
    assert answers(out)[0] == "first 0"
    assert check_shards(ShardView(out)).problems == []
    monkeypatch.undo()
    with pytest.raises(ConvertError, match="found another conversion"):
        run(first, out, resume=True)  # what lies beside the set is the other's
    assert run(other, out, resume=True).resumed == 1
    assert answers(out) == [f"other {number}" for number in range(8)]
    run(other, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from composer_path.storage import atomic, places
from composer_path.conversion.convert import convert

class Counting:
    def __getattr__(self, name):
        return getattr(os, name)
    def replace(self, source, target):
        tick(); os.replace(source, target); tick()
    def rename(self, source, target):
        tick(); os.rename(source, target); tick()

limit = None
def tick():
    global limit
    if limit is not None:
        limit -= 1
        if limit == 0:
            os.kill(os.getpid(), signal.SIGKILL)

atomic.os = places.os = Counting()
unlink = Path.unlink
def ticking_unlink(self, missing_ok=False):
    tick(); unlink(self, missing_ok)
Path.unlink = ticking_unlink
def contents(folder, hidden=False):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if hidden or not name.startswith((".replacement", ".lock"))}
def run(data, out, **options):
    return convert(data, "imgs", out, partition_size=3, ids="keep", **options)
run("first.json", "first"); run("other.json", "other")
first, other = contents("first"), contents("other")
kills = lost = 0
while True:
    shutil.rmtree("out", ignore_errors=True)
    shutil.copytree("first", "out")
    pid = os.fork()
    if pid == 0:
        limit = kills + 1
        run("other.json", "out", overwrite=True)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if killed == 0:
        break
    found = contents("out")
    if "index.json" in found:
        assert any({k: v for k, v in found.items() if k in one} == one for one in (first, other)), kills
    else:
        lost += 1
    run("other.json", "out", **({"resume": True} if kills % 2 else {"overwrite": True}))
    assert contents("out", hidden=True) == other, (kills, sorted(contents("out", hidden=True)))
    kills += 1
print(kills, lost)
"""


def test_an_overwriting_killed_at_any_moment_leaves_one_of_both_sets_or_none_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, "first"), write(tmp_path, "other", 5)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    line = [sys.executable, "-c", KILLS]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    kills, without_index = map(int, result.stdout.split())
    assert kills > 30 and without_index < kills / 2


# --------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("name", ["data", "link to data", "image", "key", "notes", "in out", "folder", "mapping"])
def test_a_list_of_rejected_records_overwrites_nothing_else(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "input", "first")
    (tmp_path / "link.json").symlink_to(data)
    (tmp_path / "notes.jsonl").write_text('{"years": "of work"}\n')
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, {"conversations": []}]))
    convert(data, data.parent / "imgs", tmp_path / "earlier", on_error="skip")  # makes the key and the mapping
    places = {
        "data": data,
        "link to data": tmp_path / "link.json",
        "image": data.parent / "imgs" / "0.png",
        "key": data.parent / "identifiers.key",
        "mapping": data.parent / "first.idmap.jsonl",
        "notes": tmp_path / "notes.jsonl",
        "in out": tmp_path / "out" / "rejected.jsonl",
        "folder": tmp_path,
    }
    before = files_of(tmp_path)
    with pytest.raises(ConvertError, match=r"--rejected .*: must name a new file, or an earlier list.*found"):
        convert(data, data.parent / "imgs", tmp_path / "out", on_error="skip", rejected=places[name])
    assert files_of(tmp_path) == before
    earlier = data.parent / "rejected.jsonl"
    assert earlier.exists()
    convert(data, data.parent / "imgs", tmp_path / "out", on_error="skip", rejected=earlier)


def test_data_that_are_called_as_the_list_are_not_overwritten(tmp_path: Path) -> None:
    data = write(tmp_path, "rejected").rename(tmp_path / "rejected.jsonl")
    before = data.read_bytes()
    with pytest.raises(ConvertError, match="found a file that this conversion reads"):
        convert(data, tmp_path / "imgs", tmp_path / "out", on_error="skip")
    assert data.read_bytes() == before


def test_the_key_never_lies_in_the_set(tmp_path: Path) -> None:
    data = write(tmp_path, "first")
    with pytest.raises(ConvertError, match=r"--key .*: must not lie in --out"):
        convert(data, tmp_path / "imgs", tmp_path / "out", key=tmp_path / "out" / "secret.key")
    assert not (tmp_path / "out").exists()
