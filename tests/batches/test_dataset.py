"""Claims about ConversationDataset, on real shards of test_data: contents, problems, indexing, and where to go on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from composer_path import IGNORE_INDEX, IMAGE_TOKEN_ID, Conversation, load_image, tokenize_conversation
from composer_path.batches.batch import PackedCollator
from composer_path.batches.dataset import ConversationDataset, is_hematoxylin_eosin
from composer_path.conversion.convert import convert
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.columns import pack_images
from composer_path.stream.resume import OrderedStreamingDataset

# Of test_data/data.json: an H&E tile, one with another stain, two images, no image, several turns.
CHOSEN = {
    "he": lambda record: isinstance(record.get("image"), str) and record["stain"] == "H&E",
    "ihc": lambda record: isinstance(record.get("image"), str) and record["stain"] != "H&E",
    "two_images": lambda record: isinstance(record.get("image"), list),
    "text_only": lambda record: "image" not in record,
    "turns": lambda record: len(record["conversations"]) > 2,
}
SECRET = "Hobnailcellsquill"  # stands in a conversation and must stand in no message


@pytest.fixture(scope="module")
def records(repo_root: Path) -> list[dict[str, Any]]:
    """Five records of test_data; a wide picture, a system message, a long question and a late image made here."""
    everything = json.loads((repo_root / "test_data" / "data.json").read_text(encoding="utf-8"))
    chosen = [next(filter(rule, everything)) for rule in CHOSEN.values()]
    question = {"from": "human", "value": f"Describe the {SECRET}."}
    answer = {"from": "assistant", "value": f"The {SECRET} is pink."}
    return [
        *chosen,
        {"id": "wide", "image": "wide.png", "conversations": [question, answer]},
        {"id": "system", "system": "Be brief.", "conversations": [question, answer], "source": "atlas"},
        {"id": "long", "conversations": [{"from": "human", "value": f"{SECRET} " * 40}, answer]},
        {
            "id": "late",
            "image": ["early.png", "late.png"],
            "conversations": [
                {"from": turn["from"], "value": "<image>\n" * (turn is question) + turn["value"]}
                for turn in (question, answer, question, answer)
            ],
        },
    ]


@pytest.fixture(scope="module")
def folder(records: list[dict[str, Any]], repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds data.json, imgs and shards."""
    folder = tmp_path_factory.mktemp("dataset")
    images = folder / "imgs"
    images.mkdir()
    Image.new("RGB", (40, 20), (200, 100, 150)).save(images / "wide.png")
    for name, grey in (("early.png", 50), ("late.png", 220)):
        Image.new("L", (30, 30), grey).save(images / name)
    for record in records[: len(CHOSEN)]:
        names = record.get("image") or []
        for name in [names] if isinstance(names, str) else names:
            (images / name).write_bytes((repo_root / "test_data" / "imgs" / name).read_bytes())
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    convert(folder / "data.json", images, folder / "shards")
    return folder


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


@pytest.fixture(scope="module")
def open_shards(folder: Path, tokenizer: Any) -> Callable[..., ConversationDataset]:
    def build(**keywords: Any) -> ConversationDataset:
        settings: dict[str, Any] = {"local": str(folder / "shards"), "batch_size": 2, "template": "llava_llama_2"}
        settings |= {"tokenizer": tokenizer, "num_image_tokens": 4, "image_size": 28}
        return ConversationDataset(**settings | keywords)

    return build


@pytest.mark.parametrize("image_position", ["front", "inline"])
def test_a_sample_is_its_record_tokenized_and_its_pictures_loaded(
    image_position: str, open_shards: Callable, records: list, folder: Path, tokenizer: Any
) -> None:
    dataset = open_shards(image_position=image_position, max_seq_len=300)
    assert len(dataset) == len(records)
    for index, record in enumerate(records):
        sample = dataset[index]
        conversation = Conversation.from_record(record)
        tokens = tokenize_conversation(conversation, tokenizer, "llava_llama_2", 4, 300, image_position)
        assert torch.equal(sample["input_ids"], tokens.input_ids)
        assert torch.equal(sample["labels"], tokens.labels)
        pictures = [load_image((folder / "imgs" / name).read_bytes(), 28) for name in conversation.images]
        assert len(sample["pixel_values"]) == len(sample["is_he"]) == len(pictures)
        assert all(torch.equal(*pair) for pair in zip(sample["pixel_values"], pictures, strict=True))
        assert int((sample["input_ids"] == IMAGE_TOKEN_ID).sum()) == 4 * len(pictures)
        assert sample["is_he"].tolist() == [record.get("stain") == "H&E"] * len(pictures)
        assert sample["source"] == record.get("source", "all")
        assert (sample["sample_id"], sample["problem"]) == (index, None)


def test_a_text_only_sample_has_no_pixels(open_shards: Callable) -> None:
    sample = open_shards()[list(CHOSEN).index("text_only")]
    assert sample["pixel_values"].shape == (0, 3, 28, 28)
    assert sample["pixel_values"].dtype == torch.uint8
    assert sample["is_he"].shape == (0,)


def test_a_turns_weight_reaches_its_labels_through_shard_loader_and_row(
    tokenizer: Any, open_shards: Callable, tmp_path: Path
) -> None:
    texts = ["Is it benign?", "No.", "Sure?", "Yes, quite."]
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, texts, strict=True)]
    turns[1]["weight"] = 0.5
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "1", "conversations": turns}]), encoding="utf-8")
    convert(data, tmp_path, tmp_path / "shards")
    sample = open_shards(local=str(tmp_path / "shards"), template="llava_llama_2")[0]
    row = PackedCollator()([sample])
    first = row.targets.tolist().index(tokenizer.eos_token_id) + 1  # the answer's end is learned with it
    assert row.target_weights.tolist() == [0.5] * first + [1.0] * (len(row.targets) - first)
    assert row.targets.tolist().count(tokenizer.eos_token_id) == 2
    assert row.loss_weight == 0.5 * first + (len(row.targets) - first)


def test_two_images_keep_their_order(open_shards: Callable, records: list, folder: Path) -> None:
    index = list(CHOSEN).index("two_images")
    first, second = open_shards()[index]["pixel_values"]
    pictures = [load_image((folder / "imgs" / name).read_bytes(), 28) for name in records[index]["image"]]
    assert torch.equal(first, pictures[0])
    assert torch.equal(second, pictures[1])
    assert not torch.equal(first, second)


def test_picture_settings_reach_the_pixels(open_shards: Callable) -> None:
    padded = open_shards(pad_color=(1, 2, 3))[5]["pixel_values"][0]
    assert padded[:, 0, 14].tolist() == [1, 2, 3]
    assert padded[:, 14, 14].tolist() == [200, 100, 150]
    assert open_shards(fit="crop")[5]["pixel_values"][0, :, 0, 14].tolist() == [200, 100, 150]
    refused = open_shards(max_pixels=799)[5]
    assert refused["problem"].endswith("[too-many-pixels]")
    assert open_shards(max_pixels=800)[5]["problem"] is None


def test_placeholders_can_be_a_function_of_the_image(open_shards: Callable) -> None:
    sample = open_shards(num_image_tokens=lambda index: 3 + index)[list(CHOSEN).index("two_images")]
    assert int((sample["input_ids"] == IMAGE_TOKEN_ID).sum()) == 3 + 4


def test_indexing_and_iterating_yield_the_same_samples(open_shards: Callable) -> None:
    dataset = open_shards(shuffle=False)
    last = len(dataset) - 1
    assert dataset[-1]["sample_id"] == dataset[last]["sample_id"] == last
    assert [sample["sample_id"] for sample in dataset[1:3]] == [1, 2]
    assert [sample["sample_id"] for sample in dataset[[4, 0]]] == [4, 0]
    iterated = list(dataset)
    assert [sample["sample_id"] for sample in iterated] == list(range(last + 1))
    for sample in iterated:
        assert torch.equal(sample["input_ids"], dataset[sample["sample_id"]]["input_ids"])


def test_keywords_of_the_parent_pass_through(open_shards: Callable) -> None:
    keywords = {"shuffle_seed": 5, "num_canonical_nodes": 2, "predownload": 7, "shuffle_block_size": 3, "epoch_size": 6}
    dataset = open_shards(shuffle=True, batch_size=3, **keywords)
    assert {key: getattr(dataset, key) for key in keywords} == keywords
    assert (dataset.shuffle, dataset.batch_size) == (True, 3)
    with pytest.raises(TypeError, match="shufle"):
        open_shards(shufle=True)


def assert_unusable(sample: Any, problem: str) -> None:
    assert re.search(problem, sample["problem"])
    assert SECRET not in sample["problem"]
    assert sample["labels"].tolist() == [IGNORE_INDEX]
    assert sample["input_ids"].shape == (1,)
    assert int(sample["input_ids"]) >= 0
    assert sample["pixel_values"].shape == (0, 3, 28, 28)
    assert sample["is_he"].shape == (0,)


def test_a_sample_whose_answer_is_cut_away_is_a_problem(open_shards: Callable) -> None:
    dataset = open_shards(max_seq_len=150)
    assert_unusable(dataset[7], "no answer is left within max_seq_len=150")
    assert dataset[7]["sample_id"] == 7
    assert dataset[6]["problem"] is None
    assert dataset[6]["source"] == "atlas"


def test_an_image_that_does_not_fit_is_a_problem_too(open_shards: Callable) -> None:
    dataset = open_shards(template="plain", num_image_tokens=60, max_seq_len=50)
    assert_unusable(dataset[0], "no answer is left within max_seq_len=50")


def test_pixels_of_an_image_that_was_cut_away_are_left_out(open_shards: Callable) -> None:
    whole = open_shards(max_seq_len=4096)[8]
    assert whole["pixel_values"][:, 0, 14, 14].tolist() == [50, 220]
    second = int((whole["input_ids"] == IMAGE_TOKEN_ID).nonzero()[4])  # where the second image's 4 placeholders start
    cut = open_shards(max_seq_len=second + 3)[8]
    assert (cut["problem"], len(cut["is_he"])) == (None, 1)
    assert cut["pixel_values"][:, 0, 14, 14].tolist() == [50]
    assert int((cut["input_ids"] == IMAGE_TOKEN_ID).sum()) == 4


def test_a_conversation_that_the_template_cannot_express_is_a_problem(open_shards: Callable) -> None:
    dataset = open_shards(template="plain")
    assert_unusable(
        dataset[list(CHOSEN).index("turns")], "template 'plain' holds one question .* found [2-9] questions"
    )
    assert dataset[5]["problem"] is None


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[[bytes, bytes], str]:
    """A copy of the shards, without checksums, in which some bytes, found once, are others."""

    def damage(old: bytes, new: bytes) -> str:
        copy = tmp_path / "damaged"
        shutil.copytree(folder / "shards", copy)
        (shard,) = copy.rglob("*.mds")
        data = shard.read_bytes()
        assert (data.count(old), len(new)) == (1, len(old))
        shard.write_bytes(data.replace(old, new))
        index = json.loads((copy / "index.json").read_text())
        for entry in index["shards"]:
            entry["raw_data"]["hashes"] = {}  # with checksums the whole shard would be refused
        (copy / "index.json").write_text(json.dumps(index))
        index = json.loads((copy / "index.json").read_text())
        index["shards"][0]["raw_data"]["hashes"] = {}  # they would refuse the whole shard
        (copy / "index.json").write_text(json.dumps(index))
        return str(copy)

    return damage


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_damaged_image_bytes_are_a_problem_that_names_the_rule(
    decoder: str, damaged: Callable, open_shards: Callable, records: list, folder: Path
) -> None:
    image = (folder / "imgs" / records[0]["image"]).read_bytes()
    scan = image[-400:]  # original JPEG data is kept
    dataset = open_shards(local=damaged(scan, b"\xff\xd9" + bytes(398)), decoder=decoder)
    assert_unusable(dataset[0], "^an image must decode, found ")
    assert [dataset[index]["problem"] for index in range(1, len(records))] == [None] * (len(records) - 1)


def test_a_damaged_record_is_a_problem(damaged: Callable, open_shards: Callable, folder: Path) -> None:
    packed = pack_images([(folder / "imgs" / "wide.png").read_bytes()])[:8]
    dataset = open_shards(local=damaged(packed, b"\x07" + packed[1:]))
    assert_unusable(dataset[5], "damaged or not of this format")


def test_a_setting_that_fails_every_sample_is_an_error_and_no_problem(open_shards: Callable) -> None:
    with pytest.raises(ValueError, match="num_image_tokens"):
        open_shards(num_image_tokens=0)[0]


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_word_of_a_preparation_is_refused(open_shards: Callable) -> None:
    with pytest.raises(ValueError, match="image_position: must be 'front' or 'inline', found 'back'"):
        open_shards(image_position="back")
    with pytest.raises(ValueError, match="fit must be 'pad' or 'crop', found 'stretch'"):
        open_shards(fit="stretch")


def test_shards_of_another_format_are_refused_with_both_lists_of_columns(open_shards: Callable, tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "other"), columns={"image": "bytes", "caption": "str"}) as writer:
        writer.write({"image": b"", "caption": SECRET})
    with pytest.raises(
        ValueError, match=r"columns id, conversation, images, metadata, found caption, image; .*convert"
    ):
        open_shards(local=str(tmp_path / "other"))


def test_the_state_names_the_epoch_that_comes_next(open_shards: Callable) -> None:
    dataset = open_shards(shuffle=True)
    parent = super(OrderedStreamingDataset, dataset)
    assert dataset.state_dict(0, True)["epoch"] == 0  # before the first sample
    for finished in range(2):
        list(dataset)
        # Composer asks at the end of an epoch with the counts of the next one, while Streaming names the finished
        # epoch: loaded, that would repeat its order. If this fails, Streaming has changed and the override can go.
        assert parent.state_dict(0, True)["epoch"] == finished
        state = dataset.state_dict(0, True)
        assert state == {**state, **parent.state_dict(0, True), "epoch": finished + 1}


def test_the_state_amid_an_epoch_is_the_parents(open_shards: Callable) -> None:
    dataset = open_shards(shuffle=True)
    list(dataset)
    for num_samples in (2, 8):
        state = dataset.state_dict(num_samples, True)
        assert state == super(ConversationDataset, dataset).state_dict(num_samples, True)
        assert (state["epoch"], state["sample_in_epoch"]) == (0, num_samples)


def test_a_loaded_state_comes_back_before_it_is_used(open_shards: Callable) -> None:
    dataset = open_shards(shuffle=True, num_canonical_nodes=2)
    state = {**dataset.state_dict(0, True), "epoch": 3}
    dataset.load_state_dict(state)
    assert dataset.state_dict(0, True) == state
    list(dataset)
    assert dataset.state_dict(0, True)["epoch"] == 4


@pytest.mark.parametrize(
    ("stain", "is_he"),
    [
        *[(stain, True) for stain in ("H&E", "h&e", "HE", "H & E", "H+E", "h and e", "H-E", " H&E ")],
        *[(stain, True) for stain in ("Hematoxylin and eosin", "Haematoxylin & Eosin", "hematoxylin-eosin")],
        *[(stain, False) for stain in (None, "", "IHC (DAB)", "PAS", "hematoxylin", "HER2", "trichrome", "not H&E")],
    ],
)
def test_only_a_stain_named_as_he_counts_as_it(stain: str | None, is_he: bool) -> None:
    assert is_hematoxylin_eosin(stain) is is_he
