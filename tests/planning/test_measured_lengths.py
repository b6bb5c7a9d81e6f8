"""Claims about measuring: lengths are those of training, images are never read, training takes or refuses them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from composer_path.batches.dataset import ConversationDataset
from composer_path.batches.loader import build_dataloader
from composer_path.config.reading import load_config, plain
from composer_path.conversion.convert import convert
from composer_path.planning.measured_lengths import image_tokens_of, lengths_problems, training_sets
from composer_path.records.tokenize import IGNORE_INDEX
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.columns import COLUMNS, pack_images
from composer_path.shards.lengths import LengthsError, SampleLengths, read_lengths
from composer_path.storage.places import Folder
from composer_path.train import main as train

REPO_ROOT = Path(__file__).resolve().parents[2]


def command() -> Any:
    spec = importlib.util.spec_from_file_location("measure_lengths", REPO_ROOT / "data_prep" / "measure_lengths.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measure = command()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions and conversations, some with two images and some with none, in several shards."""
    folder = tmp_path_factory.mktemp("measured")
    for name, count in (("captions", 30), ("data", 336)):
        records = json.loads((REPO_ROOT / "test_data" / f"{name}.json").read_text(encoding="utf-8"))[:count]
        (folder / f"{name}.json").write_text(json.dumps(records[:: 4 if name == "data" else 1]), encoding="utf-8")
        convert(folder / f"{name}.json", REPO_ROOT / "test_data" / "imgs", folder / name, size_limit="256kb")
    return folder


def arguments(shards: Path, *more: str, name: str = "data") -> list[str]:
    return [
        str(REPO_ROOT / "yamls" / "demo" / "finetune.yaml"),
        f"train_loader.dataset.local={shards / name}",
        f"tokenizer.path={REPO_ROOT / 'test_data' / 'tokenizer'}",
        f"model.language_model.config={REPO_ROOT / 'test_data' / 'llama' / 'config.json'}",
        "model.projector.weights=null",
        *more,
    ]


def settings_of(words: list[str]) -> dict[str, Any]:
    return plain(load_config(words[0], words[1:]))


def lengths_in(folder: Path, words: list[str]) -> SampleLengths:
    settings = settings_of(words)
    (found, *_) = training_sets(settings, ("train_loader",))
    return read_lengths(Folder(folder), found.key(load_tokenizer(**settings["tokenizer"])))


@pytest.mark.parametrize(
    ("template", "max_seq_len", "position"),
    [("llava_llama_2", 512, "front"), ("llava_llama_2", 90, "inline"), ("plain", 40, "front")],
)
def test_measured_lengths_are_those_of_training(
    template: str, max_seq_len: int, position: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [f"train_loader.dataset.template={template}", f"train_loader.dataset.max_seq_len={max_seq_len}"]
    words = arguments(shards, *overrides, f"train_loader.dataset.image_position={position}")
    assert measure.main([*words, "--out", str(tmp_path), "--workers", "2"]) == 0
    lengths = lengths_in(tmp_path, words)
    settings = settings_of(words)
    keys = ("local", "template", "max_seq_len", "image_position")
    dataset = ConversationDataset(
        **{key: settings["train_loader"]["dataset"][key] for key in keys},
        tokenizer=load_tokenizer(**settings["tokenizer"]),
        num_image_tokens=image_tokens_of(settings["model"]),
        image_size=28,
        batch_size=1,
    )
    samples = [dataset[index] for index in range(len(lengths))]
    assert len(samples) == 84
    assert lengths.tokens.tolist() == [len(sample["input_ids"]) for sample in samples]
    answers = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples]
    assert lengths.answer_tokens.tolist() == answers
    assert lengths.images.tolist() == [len(sample["pixel_values"]) for sample in samples]
    unusable = sum(sample["problem"] is not None for sample in samples)
    assert (unusable > 0) == (template == "plain" or max_seq_len == 90)
    assert len(set(lengths.tokens.tolist())) > 5
    assert "train_loader.dataset: 84 samples" in capsys.readouterr().out


def test_the_same_bytes_for_any_number_of_processes_and_nothing_is_measured_twice(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(shards)
    for workers in (1, 2):
        assert measure.main([*words, "--out", str(tmp_path / str(workers)), "--workers", str(workers)]) == 0
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("1", "2"))
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    monkeypatch.setattr("composer_path.planning.measured_lengths.ShardView", None)  # cannot be read now
    assert measure.main([*words, "--out", str(tmp_path / "1")]) == 0
    with pytest.raises(TypeError):
        measure.main([*words, "--out", str(tmp_path / "1"), "--force"])


def test_images_are_neither_decoded_nor_read(shards: Path, tmp_path: Path) -> None:
    """Their bytes are overwritten: a sample that looked at them would fail, or be shorter."""
    words = arguments(shards)
    assert measure.main([*words, "--out", str(tmp_path / "before")]) == 0
    view_index = json.loads((shards / "data" / "index.json").read_text())
    copy = tmp_path / "data"
    for shard in view_index["shards"]:
        name = shard["raw_data"]["basename"]
        data = bytearray((shards / "data" / name).read_bytes())
        at = data.find(b"\xff\xd8\xff")
        while at >= 0:
            data[at : at + 300] = bytes(300)
            at = data.find(b"\xff\xd8\xff", at + 300)
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    (copy / "index.json").write_bytes((shards / "data" / "index.json").read_bytes())
    assert measure.main([*arguments(tmp_path), "--out", str(tmp_path / "after")]) == 0
    before, after = (lengths_in(tmp_path / name, words).tokens.tolist() for name in ("before", "after"))
    assert before == after


def test_a_mixture_has_one_file_a_stream_by_its_own_template(shards: Path, tmp_path: Path) -> None:
    streams = (
        f"{{captions: {{local: {shards / 'captions'}, template: plain}}, "
        f"chats: {{local: {shards / 'data'}, system: Be brief., repeat: 1.5}}}}"
    )
    words = arguments(shards, f"train_loader.dataset.streams={streams}", f"train_loader.lengths={tmp_path}")
    words += ["train_loader.dataset.local=null", "train_loader.balance=global"]
    assert measure.main([*words, "--workers", "1"]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    settings = settings_of(words)
    assert lengths_problems(settings) == []
    spec = build_dataloader(
        **settings["train_loader"],
        tokenizer=load_tokenizer(**settings["tokenizer"]),
        num_image_tokens=image_tokens_of(settings["model"]),
        image_size=28,
        mean=(0.5, 0.5, 0.5),
    )
    dataset = spec.dataloader.dataset
    tokens = dataset.stored_lengths(str(tmp_path))
    assert tokens.tolist() == [len(dataset[index]["input_ids"]) for index in range(30 + 84)]
    next(iter(spec.dataloader))
    assert dataset.imbalance == (1.0, 1.0)  # a single rank


def test_training_refuses_lengths_of_another_run_before_it_builds_anything(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer_path.train.train", None)  # nothing may be built
    words = arguments(shards, "train_loader.balance=node", f"train_loader.lengths={tmp_path}", "eval_loader=null")
    words += [f"save_root={tmp_path / 'runs'}"]
    assert train(words) == 2
    assert "train_loader.balance:" in (error := capsys.readouterr().err) and "found no lengths" in error
    assert measure.main(words) == 0
    assert lengths_problems(settings_of(words)) == []
    assert train([*words, "train_loader.dataset.max_seq_len=300"]) == 2
    assert "measured for another max_seq_len (512 there, 300 here); measure with" in capsys.readouterr().err
    assert train([*words, "model.projector.pooler.num_queries=5"]) == 2
    assert "num_image_tokens (8 there, 5 here)" in capsys.readouterr().err
    assert train([*words, f"train_loader.dataset.local={shards / 'captions'}"]) == 2
    assert "the set (its index.json)" in capsys.readouterr().err
    with pytest.raises(LengthsError, match="max_seq_len"):  # who builds a loader by hand is told, too
        build_dataloader(
            **settings_of(words)["train_loader"] | {"dataset": {"local": str(shards / "data"), "max_seq_len": 9}},
            tokenizer=load_tokenizer(REPO_ROOT / "test_data" / "tokenizer"),
            num_image_tokens=8,
            image_size=28,
            mean=(0.5, 0.5, 0.5),
        )


def test_without_balance_nothing_is_asked_for(shards: Path) -> None:
    settings = settings_of(arguments(shards))
    assert training_sets(settings) == [] == lengths_problems(settings)
    assert [found.where for found in training_sets(settings, ("train_loader",))] == ["train_loader.dataset"]


def test_a_set_that_is_not_there_or_is_cut_is_an_error_without_a_file(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert measure.main(arguments(tmp_path, name="nowhere")) == 1
    assert "found no index.json in" in capsys.readouterr().err
    (tmp_path / "cut" / "part-00000").mkdir(parents=True)
    index = json.loads((shards / "captions" / "index.json").read_text())
    (tmp_path / "cut" / "index.json").write_text(json.dumps(index))
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        (tmp_path / "cut" / name).write_bytes((shards / "captions" / name).read_bytes()[:5000])
    assert measure.main(arguments(tmp_path, "--workers", "1", name="cut")) == 1
    assert "it ends before its last sample" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["index.json", "part-00000"]


def test_compressed_shards_are_measured_too(tmp_path: Path) -> None:
    for name, compression in (("zipped", "zstd"), ("plain", None)):
        keywords = {"columns": COLUMNS, "compression": compression, "hashes": ["xxh64"], "size_limit": 1000}
        with MDSWriter(out=str(tmp_path / name), **keywords) as writer:
            for index in range(9):
                turns = [["human", "<image>\nWhat is it?"], ["assistant", "A gland. " * (index + 1)]]
                conversation = {"turns": turns, "system": None}
                images = pack_images([b"no image at all"])
                writer.write({"id": str(index), "conversation": conversation, "images": images, "metadata": {}})
        assert measure.main([*arguments(tmp_path, name=name), "--out", str(tmp_path / f"of {name}")]) == 0
    found = [lengths_in(tmp_path / f"of {name}", arguments(tmp_path, name=name)) for name in ("zipped", "plain")]
    assert np.array_equal(found[0].tokens, found[1].tokens)
    assert (np.diff(found[0].tokens) > 0).all() and len(found[0]) == 9


@pytest.mark.parametrize("words", [["--workers", "0"], ["rubbish"], ["--loader", "loader"]])
def test_wrong_arguments_end_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure.parse_arguments(["x.yaml", *words])
    assert ended.value.code == 2


def test_a_mistake_in_the_yaml_ends_with_2(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert measure.main(arguments(shards, "train_loader.balanced=node")) == 2
    assert "did you mean" in capsys.readouterr().err
