"""Shard files: what streaming's writer would write, complete or without an index, whatever happens on the way."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from composer_path.conversion import image_source
from composer_path.conversion.convert import convert, merge
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.summary import ConvertSummary
from composer_path.shards.columns import COLUMNS, unpack_images
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Folder

REPO = Path(__file__).resolve().parents[2]


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "Which stain?"}, {"from": "gpt", "value": "PAS."}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one image; tests write their data.json into it."""
    images = tmp_path / "input" / "imgs"
    images.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 120, 180)).save(file, "PNG")
    (images / "a.png").write_bytes(file.getvalue())
    return tmp_path / "input"


def write(source: Path, records: object) -> Path:
    path = source / "data.json"
    path.write_text(json.dumps(records))
    return path


def records(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "patient": f"P{i // 2}", "image": "a.png", "conversations": turns()} for i in range(count)]


def run(source: Path, records: object, out: Path, **options: Any) -> ConvertSummary:
    return convert(write(source, records), source / "imgs", out, **options)


def read_back(folder: Path) -> list[dict[str, Any]]:
    """All samples, by streaming's own readers and with its hash check, without its shared memory."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    samples = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        raw = shard["raw_data"]
        data = (folder / raw["basename"]).read_bytes()
        assert len(data) == raw["bytes"]
        assert all(get_hash(name, data) == value for name, value in raw["hashes"].items())
        reader = reader_from_json(str(folder), None, shard)
        samples += [reader[index] for index in range(shard["samples"])]
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_byte_for_byte_those_of_streamings_writer(source: Path, tmp_path: Path) -> None:
    from streaming import MDSWriter

    run(source, records(20), tmp_path / "out", size_limit=2000, hashes=["sha1", "xxh64"])
    samples = read_back(tmp_path / "out")
    with MDSWriter(
        columns=COLUMNS, out=str(tmp_path / "bare"), size_limit=2000, hashes=["sha1", "xxh64"], compression=None
    ) as writer:
        for sample in samples:
            writer.write(sample)
    bare = json.loads((tmp_path / "bare" / "index.json").read_text())
    ours = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(bare["shards"]) > 2
    for shard in bare["shards"]:
        name = shard["raw_data"]["basename"]
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "out" / "part-00000" / name).read_bytes()
        shard["raw_data"]["basename"] = f"part-00000/{name}"
    assert ours == bare


def test_a_record_larger_than_a_shard_gets_its_own(source: Path, tmp_path: Path) -> None:
    summary = run(source, records(3), tmp_path / "out", size_limit=100)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1, 1, 1]
    assert summary.shards == len(read_back(tmp_path / "out")) == 3


@pytest.mark.parametrize("options", [{"workers": 2}, {"part": 3}, {"resume": True}], ids=["workers", "parts", "resume"])
def test_the_shards_depend_on_the_input_only(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    same = {"partition_size": 3, "size_limit": 500}
    run(source, records(20), tmp_path / "one", **same)
    if "part" in options:
        for part in (3, 1, 2):
            with pytest.raises(ConvertError, match=r"all 3 parts must be there|must hold parts"):
                merge(tmp_path / "out")
            run(source, records(20), tmp_path / "out", **same, part=f"{part}/3")
        merge(tmp_path / "out", workers=2)
    else:
        run(source, records(20), tmp_path / "out", **same, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
    assert len(contents(tmp_path / "one")) > 20
    assert [sample["metadata"]["images"] for sample in read_back(tmp_path / "out")]


def test_a_list_and_lines_give_the_same_shards(source: Path, tmp_path: Path) -> None:
    many = [{**record, "source": "größe 🔬"} for record in records(10)]
    (source / "data.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(many, ensure_ascii=False, indent=1).encode())
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in many)
    (source / "data.jsonl").write_text(lines, "utf-8")
    for name in ("data.json", "data.jsonl"):
        convert(source / name, source / "imgs", tmp_path / name, partition_size=3)
    shards = [
        {name: data for name, data in contents(tmp_path / folder).items() if name.endswith(".mds")}
        for folder in ("data.json", "data.jsonl")
    ]
    assert len(shards[0]) == 4
    assert shards[0] == shards[1]


def test_duplicate_ids_and_images_are_found_across_partitions(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "imgs" / "a.png", source / "imgs" / "b.png")
    many = [*records(9), {"id": 1, "conversations": turns()}, {"image": "b.png", "conversations": turns()}]
    with pytest.raises(ConvertError, match=r"record 9: id: .*found the id of record 1;"):
        run(source, many, tmp_path / "out", partition_size=2)
    assert not (tmp_path / "out").exists()
    summary = run(source, many, tmp_path / "out", partition_size=2, on_error="skip")
    assert (summary.rejected, summary.rejected_by_rule) == (1, {"duplicate-id": 1})
    assert (summary.images, summary.repeated_images) == (10, 9)
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (card["repeated_images"], card["rejected"], card["records"]) == (9, 1, 10)
    assert card["source"]["records"] == 11


# Kills itself at the n-th change of the file system, then resumes, for every n; all in forks of one process.
KILLS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {repo!r})
from composer_path.storage import atomic, places
from composer_path.conversion.convert import convert

class Counting:
    def __getattr__(self, name):
        return getattr(os, name)
    def replace(self, source, target):
        tick(); os.replace(source, target); tick()
    def rmdir(self, path):
        tick(); os.rmdir(path)

limit = None
def tick():
    global limit
    if limit is not None:
        limit -= 1
        if limit == 0:
            os.kill(os.getpid(), signal.SIGKILL)

atomic.os = places.os = Counting()
def contents(folder):
    return {{p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}}
def run(out, **options):
    return convert({data!r}, {images!r}, out, size_limit=500, partition_size=3, **options)
run("whole")
whole = contents("whole")
kills = 0
while True:
    pid = os.fork()
    if pid == 0:
        limit = kills + 1
        run("out", **({{"resume": True}} if {twice} and kills % 2 else {{}}))
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if killed == 0:
        break
    assert killed == -9, killed
    found = contents("out")
    if "index.json" in found:
        assert {{name: found[name] for name in whole}} == whole, kills
    run("out", resume=True)
    assert contents("out") == whole, (kills, sorted(contents("out")), sorted(whole))
    run("out", overwrite=True)
    assert contents("out") == whole, kills
    __import__("shutil").rmtree("out")
    kills += 1
print(kills)
"""


def test_a_conversion_killed_at_any_moment_has_no_index_and_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    data, images = str(write(source, records(8))), str(source / "imgs")
    script = KILLS.format(repo=str(REPO), data=data, images=images, twice=True)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_converting_does_not_wait_for_torch_to_be_imported() -> None:
    """Neither the command nor its workers; only --resize needs it."""
    code = "import sys, composer_path.conversion.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


def test_an_error_never_publishes_and_the_rest_can_be_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, records(10), tmp_path / "whole", partition_size=3)
    calls = []
    write_file = Folder.write

    def full_disk(self: Folder, name: str, parts: Any, durable: bool = False) -> None:
        calls.append(name)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        write_file(self, name, parts, durable)

    monkeypatch.setattr(Folder, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(source, records(10), tmp_path / "out", partition_size=3)
    monkeypatch.undo()
    assert (tmp_path / "out" / "part-00000" / "done.json").exists()
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(ConvertError, match="go on with --resume"):
        run(source, records(10), tmp_path / "out", partition_size=3)
    with pytest.raises(ConvertError, match="found another conversion"):
        run(source, records(11), tmp_path / "out", partition_size=3, resume=True)

    def no_image(*arguments: Any, **keywords: Any) -> Any:
        read.append(1)
        return examine(*arguments, **keywords)

    read: list[int] = []
    examine = image_source.Examiner.examine
    monkeypatch.setattr(image_source.Examiner, "examine", no_image)
    summary = run(source, records(10), tmp_path / "out", partition_size=3, resume=True)
    assert summary.resumed == 1
    assert 3 <= len(read) <= 7  # of the seven other records only; within a partition the image is remembered
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_file_damaged_before_the_resume_is_made_again(source: Path, tmp_path: Path, damage: str) -> None:
    run(source, records(10), tmp_path / "out", partition_size=3)
    whole = contents(tmp_path / "out")
    path = tmp_path / "out" / "part-00001" / "shard.00000.mds"
    data = path.read_bytes()
    changed = {"cut": data[:-1], "flip": data[:-1] + bytes([data[-1] ^ 1]), "delete": None}[damage]
    path.unlink() if changed is None else path.write_bytes(changed)
    assert run(source, records(10), tmp_path / "out", partition_size=3, resume=True).resumed == 3
    assert contents(tmp_path / "out") == whole


def test_merge_refuses_a_damaged_part(source: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        run(source, records(8), tmp_path / "out", partition_size=3, part=f"{part}/2")
    path = tmp_path / "out" / "part-00001" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match=r"part-00001/shard.00000.mds must be the \d+ bytes that were written"):
        merge(tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(ConvertError, match="begun before"):
        run(source, records(8), tmp_path / "out", partition_size=3, part="2/2")
    with pytest.raises(ConvertError, match=r"agree on their number|begun before"):
        run(source, records(8), tmp_path / "out", partition_size=3, part="3/3")
    run(source, records(8), tmp_path / "out", partition_size=3, part="2/2", resume=True)
    assert merge(tmp_path / "out").records == len(read_back(tmp_path / "out")) == 8


def test_overwrite_leaves_no_orphan_and_touches_nothing_else(source: Path, tmp_path: Path) -> None:
    run(source, records(30), tmp_path / "out", partition_size=3, size_limit=300)
    (tmp_path / "out" / "part-00003" / ".shard.00007.mds.4711.unfinished").write_bytes(b"left")
    run(source, records(4), tmp_path / "fresh")
    run(source, records(4), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for option in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ConvertError, match=r"found 1 others, such as 'thesis.tex'"):
            run(source, records(5), tmp_path / "out", **option)
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert len(read_back(tmp_path / "out")) == 4


def test_bad_records_take_back_what_was_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match=r"record 20: .*empty-conversation"):
        run(source, [*records(20), {"conversations": []}], tmp_path / "out", partition_size=3)
    assert not contents(tmp_path / "out") if (tmp_path / "out").exists() else True


def test_damage_in_the_pixels_is_found_by_the_full_check_only(source: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    data = file.getvalue()
    start = data.index(b"IDAT")
    half = data[start : start + 1000]  # whole chunks with the right checksums: only decoding tells
    data = data[: start - 4] + (996).to_bytes(4) + half + zlib.crc32(half).to_bytes(4) + data[-12:]
    (source / "imgs" / "flip.png").write_bytes(data)
    with pytest.raises(ConvertError, match="unreadable-image"):
        run(source, [{"image": "flip.png", "conversations": turns()}], tmp_path / "out")
    summary = run(source, [{"image": "flip.png", "conversations": turns()}], tmp_path / "out", check="header")
    assert summary.images == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("check", ["full", "header"])
def test_a_truncated_image_is_found_by_both_checks(source: Path, tmp_path: Path, format: str, check: str) -> None:
    file = io.BytesIO()
    Image.effect_noise((256, 256), 50).convert("RGB").save(file, format)
    (source / "imgs" / "cut").write_bytes(file.getvalue()[:-500])
    with pytest.raises(ConvertError, match="unreadable-image"):
        run(source, [{"image": "cut", "conversations": turns()}], tmp_path / "out", check=check)


def test_resized_images_are_finished_squares(source: Path, tmp_path: Path) -> None:
    from stored_images import load_stored_image

    from composer_path.images.pixels import load_image

    resized = {"image_size": 16, "fit": "pad", "pad_color": [1, 2, 3]}
    run(source, records(1), tmp_path / "out", resized=resized)
    (data,) = unpack_images(read_back(tmp_path / "out")[0]["images"])
    expected = load_image((source / "imgs" / "a.png").read_bytes(), 16, "pad", "pil", [1, 2, 3])
    assert load_stored_image(data, 16, "pad", "pil", [1, 2, 3]).equal(expected)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["resized"] == resized
