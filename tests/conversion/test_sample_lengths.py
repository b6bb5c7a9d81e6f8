"""Lengths that a conversion counts on the way are those that `composer-path lengths` measures, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from composer_path.cli import main
from composer_path.storage.places import open_place

REPO = Path(__file__).resolve().parents[2]
OPTIONS = ("--ids", "keep", "--partition-size", "8", "--size-limit", "256kb", "--workers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, some with two images and some with none, for four partitions."""
    records = json.loads((REPO / "test_data" / "data.json").read_text(encoding="utf-8"))[:300:10]
    path = tmp_path_factory.mktemp("records") / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def yaml(out: object, *more: str) -> list[str]:
    """The demo's YAML as it reads a place, and what a training of its own says otherwise."""
    return [
        str(REPO / "yamls" / "demo" / "finetune.yaml"),
        f"train_loader.dataset.local={out}",
        f"tokenizer.path={REPO / 'test_data' / 'tokenizer'}",
        f"model.language_model.config={REPO / 'test_data' / 'llama' / 'config.json'}",
        "model.projector.weights=null",
        "eval_loader=null",
        *more,
    ]


def convert(data: Path, out: object, *options: str, lengths: list[str] | None = None) -> int:
    images = str(REPO / "test_data" / "imgs")
    words = ["--data", str(data), "--images", images, "--out", str(out), *OPTIONS, *options]
    return main(["convert", *words, *(["--lengths", *lengths] if lengths else [])])


def lengths_in(place: object) -> dict[str, bytes]:
    found = open_place(str(place))
    return {name: found.read(name) for name in found.files() if name.startswith("lengths-")}


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the other command makes of the same set."""
    out = tmp_path_factory.mktemp("measured") / "set"
    assert convert(data, out) == 0
    assert main(["lengths", *yaml(out), "--workers", "1"]) == 0
    found = lengths_in(out)
    assert len(found) == 1
    return found


def test_one_pass_writes_what_the_second_command_would(
    data: Path, measured: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, tmp_path / "set", lengths=yaml(tmp_path / "set")) == 0
    assert lengths_in(tmp_path / "set") == measured
    (name,) = measured
    assert f"lengths of samples in               {tmp_path / 'set' / name}" in capsys.readouterr().out


@pytest.mark.slow  # each imports torch: 8 s
def test_several_processes_count_the_same(data: Path, measured: dict[str, bytes], tmp_path: Path) -> None:
    assert convert(data, tmp_path / "set", "--workers", "2", lengths=yaml(tmp_path / "set")) == 0
    assert lengths_in(tmp_path / "set") == measured


def test_a_bucket_and_a_folder_of_lengths_get_the_same_file(
    data: Path, measured: dict[str, bytes], tmp_path: Path
) -> None:
    out = f"memory://{tmp_path.name}/set"
    words = yaml(tmp_path / "cache", f"train_loader.dataset.remote={out}/")
    assert convert(data, out, lengths=words) == 0
    assert lengths_in(out) == measured
    words += [f"train_loader.lengths={tmp_path / 'apart'}"]
    assert convert(data, out, "--overwrite", lengths=words) == 0
    assert (lengths_in(out), lengths_in(tmp_path / "apart")) == ({}, measured)


def test_a_resumed_conversion_counts_what_it_takes_over(
    data: Path, measured: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, tmp_path / "set") == 0
    before = (tmp_path / "set" / "index.json").read_bytes()
    (tmp_path / "set" / "part-00001" / "done.json").unlink()  # this one is made again
    assert convert(data, tmp_path / "set", "--resume", lengths=yaml(tmp_path / "set")) == 0
    assert "partitions taken over               3" in capsys.readouterr().out
    assert lengths_in(tmp_path / "set") == measured
    assert (tmp_path / "set" / "index.json").read_bytes() == before


def test_parts_keep_their_lengths_until_they_are_merged(
    data: Path, measured: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    for part in ("2/2", "1/2"):
        assert convert(data, out, "--part", part, lengths=yaml(out)) == 0
    assert sorted(name.partition(".")[2] for name in lengths_in(out)) == ["part-00001.npz", "part-00002.npz"]
    assert main(["merge", str(out), "--workers", "1"]) == 0
    assert lengths_in(out) == measured
    assert "lengths of samples in" in capsys.readouterr().out


@pytest.mark.parametrize("other", [None, "train_loader.dataset.max_seq_len=99"])
def test_parts_of_which_one_counted_nothing_or_something_else_make_no_lengths(
    other: str | None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert convert(data, out, "--part", "1/2", lengths=yaml(out)) == 0
    assert convert(data, out, "--part", "2/2", lengths=yaml(out, other) if other else None) == 0
    assert main(["merge", str(out), "--workers", "1"]) == 0
    assert lengths_in(out) == {}
    assert "not written: a part was converted without --lengths" in capsys.readouterr().out


def test_lengths_of_a_part_that_was_made_anew_are_not_taken_for_its_samples(data: Path, tmp_path: Path) -> None:
    records = json.loads(data.read_text(encoding="utf-8"))
    images = tmp_path / "imgs"
    images.mkdir()
    for record in records:
        names = record.get("image") or []
        for name in [names] if isinstance(names, str) else names:
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes((REPO / "test_data" / "imgs" / name).read_bytes())
    out, words = tmp_path / "set", ["--images", str(images), "--on-error", "skip"]
    for part in ("1/2", "2/2"):
        assert convert(data, out, *words, "--part", part, lengths=yaml(out)) == 0
    first = next(record["image"] for record in records if isinstance(record.get("image"), str))
    (images / first).write_bytes(b"no image any more")
    assert convert(data, out, *words, "--part", "1/2", "--resume") == 0
    assert main(["merge", str(out), "--workers", "1"]) == 0
    assert lengths_in(out) == {}


def test_each_loader_that_reads_the_place_gets_its_own(data: Path, measured: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    held_out = f"{{dataset: {{local: {out}, template: llava_llama_2, max_seq_len: 60}}, global_batch_size: 2}}"
    words = [word for word in yaml(out) if word != "eval_loader=null"]
    assert convert(data, out, lengths=[*words, "eval_loader=null", f"eval_loader={held_out}"]) == 0
    found = lengths_in(out)
    assert len(found) == 2 and measured.items() < found.items()


def test_a_yaml_that_does_not_read_the_place_is_refused_before_a_record_is_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, tmp_path / "set", lengths=yaml(tmp_path / "other")) == 2
    error = capsys.readouterr().err
    assert f"must name a YAML that reads --out {tmp_path / 'set'}, found one that reads {tmp_path / 'other'};" in error
    assert convert(data, tmp_path / "set", "seed=1") == 2
    assert "found 'seed=1' and no --lengths YAML" in capsys.readouterr().err
    assert convert(data, tmp_path / "set", lengths=yaml(tmp_path / "set", "train_loader.dataset.templat=plain")) == 2
    assert "did you mean train_loader.dataset.template?" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
