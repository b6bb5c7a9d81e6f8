"""Claims about mixtures: shares, templates, weights, and one order for any workers and ranks, also after a resume."""

from __future__ import annotations

import json
import socket
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from forked_ranks import join_two_ranks
from streaming import MDSWriter
from tiny_shards import end_workers

from composer_path import Conversation
from composer_path.batches.batch import PackedCollator
from composer_path.batches.dataset import ConversationDataset
from composer_path.batches.mixture import asking_template
from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.parallel import end_with_parent
from composer_path.records.conversation import Turn
from composer_path.records.tokenize import tokenize_conversation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.columns import COLUMNS, pack_images

GLOBAL_BATCH = 4
SIZES = {"captions": 13, "chats": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of conversations without images."""
    root = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        with MDSWriter(out=str(root / name), columns=COLUMNS, size_limit=900, hashes=["xxh64"]) as writer:
            for index in range(size):
                conversation = conversation_of(name, index).to_shard()
                sample = {"id": f"{name}{index}", "conversation": conversation, "metadata": {"source": "archive"}}
                writer.write({**sample, "images": pack_images([])})
    return root


def conversation_of(name: str, index: int) -> Conversation:
    return Conversation(
        turns=(Turn("human", f"What is {name} {index}?"), Turn("assistant", f"It is {index}.")), metadata={}
    )


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


def build(root: Path, tokenizer: Any, num_workers: int = 0, ranks: int = 1, **keywords: Any) -> WholeEpochLoader:
    streams = {
        "captions": {"local": str(root / "captions"), "template": "plain", "repeat": 1.5, "loss_weight": 0.25},
        "chats": {"local": str(root / "chats"), "template": "llava_llama_2", "system": "Be brief."},
    }
    settings: dict[str, Any] = {"streams": streams, "shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 1}
    settings |= {"tokenizer": tokenizer, "num_image_tokens": 4, "image_size": 28} | keywords
    dataset = ConversationDataset(**settings, batch_size=GLOBAL_BATCH // ranks)
    return WholeEpochLoader(
        dataset,
        batch_size=GLOBAL_BATCH // ranks,
        num_workers=num_workers,
        collate_fn=PackedCollator(),
        persistent_workers=num_workers > 0,
        worker_init_fn=end_with_parent,
    )


Epochs = list[list[list[int]]]


def read(loader: WholeEpochLoader, num_epochs: int, state: dict[str, Any] | None = None) -> Epochs:
    if state is not None:
        loader.dataset.load_state_dict(state)
    epochs = [[batch.sample_ids.tolist() for batch in loader] for _ in range(num_epochs)]
    end_workers(loader)
    return epochs


def rank_reads(rank: int, port: int, root: Path, tokenizer: Any, plan: dict[str, Any], out: Path) -> None:
    """One of two ranks, in a process of its own."""
    join_two_ranks(rank, port)
    found = {}
    for name, (num_workers, num_epochs, state) in plan.items():
        loader = build(root, tokenizer, num_workers, ranks=2)
        found[name] = read(loader, num_epochs, state)
        if state is None:
            found["state after 3 batches"] = loader.dataset.state_dict(3 * GLOBAL_BATCH, True)
        torch.distributed.barrier()
    (out / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def on_two_ranks(root: Path, tokenizer: Any, plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """The global batches of each entry of the plan; other values as rank 0 says."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = (port, root, tokenizer, plan, out)
    torch.multiprocessing.start_processes(rank_reads, arguments, nprocs=2, start_method="fork")
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    merged = {
        name: [
            [sorted(a + b) for a, b in zip(*pair, strict=True)] for pair in zip(first[name], second[name], strict=True)
        ]
        for name in plan
    }
    return first | merged


def as_sets(epochs: Epochs) -> Epochs:
    return [[sorted(batch) for batch in batches] for batches in epochs]


@pytest.fixture(scope="module")
def undisturbed(root: Path, tokenizer: Any) -> Epochs:
    return as_sets(read(build(root, tokenizer), 3))


def test_an_epoch_holds_each_stream_as_often_as_it_says(undisturbed: Epochs) -> None:
    for batches in undisturbed:
        counts = Counter(index for batch in batches for index in batch)
        captions = {index: count for index, count in counts.items() if index < SIZES["captions"]}
        assert sum(captions.values()) == int(1.5 * SIZES["captions"])
        assert set(captions.values()) == {1, 2}
        assert [counts[index] for index in range(SIZES["captions"], sum(SIZES.values()))] == [1] * SIZES["chats"]
    assert undisturbed[0] != undisturbed[1] != undisturbed[2]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_order_of_a_mixture_is_the_same_for_any_number_of_workers(
    num_workers: int, undisturbed: Epochs, root: Path, tokenizer: Any
) -> None:
    assert as_sets(read(build(root, tokenizer, num_workers), 2)) == undisturbed[:2]


def state_after(root: Path, tokenizer: Any, epoch: int, batches: int) -> dict[str, Any]:
    """What Composer stores."""
    loader = build(root, tokenizer)
    for _ in range(epoch):
        list(loader)
    if batches:
        reading = iter(loader)
        for _ in range(batches):
            next(reading)
    return json.loads(json.dumps(loader.dataset.state_dict(batches * GLOBAL_BATCH, True)))


@pytest.mark.parametrize(("epoch", "done"), [*product([0, 1], [1, 5, 10]), (1, 0), (2, 0)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_goes_on_where_it_stopped(
    epoch: int, done: int, num_workers: int, undisturbed: Epochs, root: Path, tokenizer: Any
) -> None:
    state = state_after(root, tokenizer, epoch, done)
    rest = [undisturbed[epoch][done:], *undisturbed[epoch + 1 :]]
    assert as_sets(read(build(root, tokenizer, num_workers), len(rest), state)) == rest


@pytest.mark.world_size(2)
def test_two_ranks_read_the_same_global_batches_and_take_over_from_one_and_back(
    undisturbed: Epochs, root: Path, tokenizer: Any, tmp_path: Path
) -> None:
    first_epoch = undisturbed[0]
    plan = {
        "fresh": (0, 2, None),
        "fresh, with workers": (1, 1, None),
        "from one rank": (0, 2, state_after(root, tokenizer, 0, 5)),
        "from one rank's epoch end, with workers": (1, 1, state_after(root, tokenizer, 1, 0)),
    }
    found = on_two_ranks(root, tokenizer, plan, tmp_path)
    # 43 samples: the ranks repeat one, so that both have as many.
    whole = len(first_epoch) - 1
    assert [batches[:whole] for batches in found["fresh"]] == [batches[:whole] for batches in undisturbed[:2]]
    assert found["fresh, with workers"][0][:whole] == first_epoch[:whole]
    assert found["from one rank"][0][: whole - 5] == first_epoch[5:whole]
    assert found["from one rank"][1][:whole] == undisturbed[1][:whole]
    assert found["from one rank's epoch end, with workers"][0][:whole] == undisturbed[1][:whole]
    back = as_sets(read(build(root, tokenizer), 2, found["state after 3 batches"]))
    assert back[0] == first_epoch[3:]


def test_each_stream_has_its_own_template_system_message_name_and_weight(root: Path, tokenizer: Any) -> None:
    loader = build(root, tokenizer, shuffle=False)
    caption, chat = loader.dataset[0], loader.dataset[SIZES["captions"]]
    system = {"name": "llava_llama_2", "system": "Be brief."}
    for sample, name, template in ((caption, "captions", "plain"), (chat, "chats", system)):
        expected = tokenize_conversation(conversation_of(name, 0), tokenizer, template, 4)
        assert torch.equal(sample["input_ids"], expected.input_ids)
        assert sample["source"] == name
    batch = PackedCollator()([caption, chat])
    weights = [0.25] * int(batch.num_targets[0]) + [1.0] * int(batch.num_targets[1])
    assert batch.target_weights.tolist() == weights
    assert batch.loss_weight == sum(weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": {"proportion": 1.0, "repeat": 2.0}, "b": {}}, "streams.a: found proportion and repeat"),
        ({"a": {"proportion": 1.0}, "b": {}}, "a has a proportion, b has none"),
        ({"a": {"repeat": 0.0}, "b": {}}, "streams.a.repeat: found 0.0; it must be above 0"),
        ({"a": {"loss_weight": -1.0}, "b": {}}, r"streams.a.loss_weight: found -1.0"),
        ({"a": {"local": "x"}, "b": {"local": "x"}}, "streams.b.local: is also the folder of a"),
        ({"a": {"template": "plain", "system": "Hi."}, "b": {}}, "template.system: 'plain' has no such setting"),
        ({}, "streams: found none"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(changes: dict, message: str, root: Path, tokenizer: Any) -> None:
    streams = {name: {"local": str(root / name)} | keywords for name, keywords in changes.items()}
    with pytest.raises(ValueError, match=message):
        build(root, tokenizer, streams=streams)


PLAIN, CHAT = {"local": "a", "template": "plain"}, {"local": "b", "template": "llava_llama_2"}
BRIEF = {"local": "c", "template": "llava_llama_2", "system": "Be brief."}


@pytest.mark.parametrize(
    ("template", "streams", "asked"),
    [
        (None, None, "plain"),
        ("llava_llama_2", None, "llava_llama_2"),
        (None, {"a": CHAT, "b": {**CHAT, "local": "d"}}, "llava_llama_2"),
        ("llava_llama_2", {"a": {"local": "a"}, "b": {"local": "b", "template": None}}, "llava_llama_2"),
        ("llava_llama_2", {"a": PLAIN, "b": CHAT}, "llava_llama_2"),
        ({"name": "llava_llama_2", "system": "S"}, {"a": PLAIN, "b": BRIEF}, {"name": "llava_llama_2", "system": "S"}),
        (None, {"a": BRIEF}, {"name": "llava_llama_2", "system": "Be brief."}),
    ],
)
def test_a_model_is_asked_with_the_template_that_is_trained_or_named(template: Any, streams: Any, asked: Any) -> None:
    assert asking_template(template, streams).to_json() == asked


@pytest.mark.parametrize(
    ("template", "streams", "message"),
    [
        (None, {"a": PLAIN, "b": CHAT}, r"template: is missing, and the streams have several \(plain, llava_llama_2\)"),
        (None, {"a": CHAT, "b": BRIEF}, "template: is missing, and the streams have 'llava_llama_2' with several"),
        ("plain", {"a": CHAT}, "template: found 'plain', but the streams are trained with llava_llama_2"),
    ],
)
def test_several_templates_need_one_named_for_asking(template: Any, streams: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asking_template(template, streams)


def test_what_a_mixture_exports_is_asked_of_the_built_dataset(root: Path, tokenizer: Any) -> None:
    named = build(root, tokenizer, template="llava_llama_2").dataset
    assert named.text.template.to_json() == "llava_llama_2"
    with pytest.raises(ValueError, match="name the one that the model is asked with"):
        build(root, tokenizer).dataset.text  # noqa: B018
