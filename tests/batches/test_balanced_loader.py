"""A loader whose ranks are balanced: the same global batches, resumed by any number of ranks; where `auto` does it."""

from __future__ import annotations

import json
import socket
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing
from forked_ranks import join_two_ranks
from streaming import MDSWriter
from streaming.base.batching import generate_work
from streaming.base.world import World
from test_balance import sets_of
from tiny_shards import end_workers

from composer_path.batches.balance import balance_work
from composer_path.batches.batch import PackedCollator
from composer_path.batches.dataset import ConversationDataset
from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.parallel import end_with_parent
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.columns import COLUMNS, pack_images
from composer_path.shards.lengths import LengthsError
from composer_path.stream.error import StreamError
from composer_path.stream.order import METHOD, sample_of

WORDS = "gland stroma nucleus mitosis duct vessel fat muscle"
NUM_SAMPLES, GLOBAL_BATCH = 67, 8
SIZES = {"a": 24, "b": 43}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of conversations of very different lengths."""
    root = tmp_path_factory.mktemp("balance")
    draw = np.random.default_rng(3)
    for name, size in SIZES.items():
        with MDSWriter(out=str(root / name), columns=COLUMNS, size_limit=2000, hashes=["xxh64"]) as writer:
            for index in range(size):
                answer = " ".join([WORDS] * int(draw.integers(1, 12)))
                turns = (Turn("human", "What is this?"), Turn("assistant", answer))
                conversation = Conversation(turns=turns, metadata={}).to_shard()
                sample = {"id": f"{name}{index}", "conversation": conversation, "metadata": {}}
                writer.write({**sample, "images": pack_images([])})
    return root


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


def no_lengths() -> Any:
    raise LengthsError("found no lengths of this set's samples")


def build(root: Path, tokenizer: Any, tokens: Any, num_workers: int = 0, ranks: int = 1, balance: str = "node") -> Any:
    """A loader of both sets; with `auto`, `tokens` None are lengths that aren't there."""
    streams: dict[str, Any] = {"a": {"local": str(root / "a"), "repeat": 1.5}, "b": {"local": str(root / "b")}}
    settings: dict[str, Any] = {"streams": streams, "shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 4}
    settings |= {"tokenizer": tokenizer, "num_image_tokens": 4, "image_size": 28, "template": "llava_llama_2"}
    dataset = ConversationDataset(**settings, batch_size=GLOBAL_BATCH // ranks)
    if balance == "auto":
        dataset.balance_if_measured(no_lengths if tokens is None else lambda: tokens)
    elif tokens is not None:
        dataset.balance(tokens, balance)
    return WholeEpochLoader(
        dataset,
        batch_size=GLOBAL_BATCH // ranks,
        num_workers=num_workers,
        collate_fn=PackedCollator(),
        persistent_workers=num_workers > 0,
        worker_init_fn=end_with_parent,
    )


@pytest.fixture(scope="module")
def tokens(root: Path, tokenizer: Any) -> np.ndarray:
    dataset = build(root, tokenizer, None).dataset
    return np.array([len(dataset[index]["input_ids"]) for index in range(NUM_SAMPLES)], dtype=np.int32)


Epochs = list[list[list[int]]]


def read(loader: Any, num_epochs: int, state: dict[str, Any] | None = None, most: int | None = None) -> Epochs:
    if state is not None:
        loader.dataset.load_state_dict(state)
    epochs = [[sorted(batch.sample_ids.tolist()) for batch in loader][:most] for _ in range(num_epochs)]
    end_workers(loader)
    return epochs


@pytest.fixture(scope="module")
def unbalanced(root: Path, tokenizer: Any) -> Epochs:
    return read(build(root, tokenizer, None), 2)


def test_the_order_keeps_its_global_batches_for_any_nodes_ranks_and_workers(
    root: Path, tokenizer: Any, tokens: np.ndarray, unbalanced: Epochs
) -> None:
    whole = len(unbalanced[0]) - 1
    for nodes, ranks, workers in product([1, 2], [1, 2], [1, 2]):
        dataset = build(root, tokenizer, None, ranks=nodes * ranks).dataset
        world = World(nodes, ranks, workers, 0)
        for epoch, done in product([0, 1], [0, 3]):
            work = sample_of(generate_work(METHOD, dataset, world, epoch, done * GLOBAL_BATCH))
            assert work.shape[:3] == (nodes, ranks, workers)
            assert work.shape[4] == GLOBAL_BATCH // (nodes * ranks)
            balanced = balance_work(work, tokens, "node")
            assert sets_of(balanced, by_node=True) == sets_of(work, by_node=True)
            assert sets_of(balanced)[: whole - done] == unbalanced[epoch][done:whole]
            assert sets_of(balance_work(work, tokens, "global"))[: whole - done] == unbalanced[epoch][done:whole]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_one_rank_reads_the_same_batches_balanced_or_not(
    num_workers: int,
    root: Path,
    tokenizer: Any,
    tokens: np.ndarray,
    unbalanced: Epochs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = build(root, tokenizer, tokens, num_workers)
    with caplog.at_level("INFO", "composer_path.batches.balance"):
        assert read(loader, 2) == unbalanced
    told = "tokens of the fullest rank over the mean rank's: 1.0000 as drawn, 1.0000 balanced"
    assert [record.getMessage() for record in caplog.records] == [told] * 2  # once an epoch
    assert loader.dataset.imbalance == (1.0, 1.0)


def rank_reads(rank: int, port: int, root: Path, tokenizer: Any, tokens: Any, plan: dict[str, Any], out: Path) -> None:
    """One of two ranks, in a process of its own."""
    join_two_ranks(rank, port)
    found: dict[str, Any] = {}
    for name, (how, num_workers, num_epochs, state) in plan.items():
        balance, _, those = how.partition(" ")
        found_here = balance != "null" and those in ("", f"on rank {rank}")
        loader = build(root, tokenizer, tokens if found_here else None, num_workers, 2, balance)
        found[name] = read(loader, num_epochs, state)
        found[f"{name}: imbalance"] = loader.dataset.imbalance
        if name == "state":
            found[name] = loader.dataset.state_dict(3 * GLOBAL_BATCH, True)
        torch.distributed.barrier()
    (out / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(
    root: Path, tokenizer: Any, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    states = []
    for lengths in (tokens, None):
        alone = build(root, tokenizer, lengths)
        next(iter(alone))
        states.append(json.loads(json.dumps(alone.dataset.state_dict(4 * GLOBAL_BATCH, True))))
    state, drawn = states
    plan = {
        "balanced": ("node", 0, 2, None),
        "balanced, one worker": ("node", 1, 2, None),
        "balanced, two workers": ("node", 2, 2, None),
        "as drawn": ("null", 0, 2, None),
        "auto": ("auto", 0, 2, None),
        "auto, found by one rank": ("auto on rank 0", 0, 2, None),
        "from one rank": ("node", 0, 2, state),
        "from one rank, two workers": ("node", 2, 2, state),
        "from one rank, auto": ("auto", 0, 2, state),
        "from one rank as drawn": ("null", 0, 2, drawn),
        "from one rank as drawn, auto": ("auto", 2, 2, drawn),
        "state": ("node", 0, 1, None),
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = (port, root, tokenizer, tokens, plan, out)
    torch.multiprocessing.start_processes(rank_reads, arguments, nprocs=2, start_method="fork")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def together(two_ranks: list[dict[str, Any]], name: str) -> Epochs:
    pairs = zip(two_ranks[0][name], two_ranks[1][name], strict=True)
    return [[sorted(one + other) for one, other in zip(*pair, strict=True)] for pair in pairs]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["balanced", "balanced, one worker", "balanced, two workers"])
def test_two_balanced_ranks_read_the_same_global_batches(
    name: str, two_ranks: list, unbalanced: Epochs, tokens: np.ndarray
) -> None:
    whole = len(unbalanced[0]) - 1
    assert [epoch[:whole] for epoch in together(two_ranks, name)] == [epoch[:whole] for epoch in unbalanced]
    assert together(two_ranks, name) == together(two_ranks, "as drawn")
    for epoch in range(2):
        loads = [[int(tokens[batch].sum()) for batch in found[name][epoch][:whole]] for found in two_ranks]
        drawn = [[int(tokens[batch].sum()) for batch in found["as drawn"][epoch][:whole]] for found in two_ranks]
        spread, spread_as_drawn = (np.abs(np.subtract(*pair)).sum() for pair in (loads, drawn))
        assert spread < 0.2 * spread_as_drawn
        assert [len(batch) for batch in two_ranks[0][name][epoch]] == [
            len(batch) for batch in two_ranks[1][name][epoch]
        ]
    before, after = two_ranks[0][f"{name}: imbalance"]
    assert after < 1.02 < before
    assert two_ranks[1][f"{name}: imbalance"] is None


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["from one rank", "from one rank, two workers"])
def test_a_balanced_epoch_goes_on_with_another_number_of_ranks(name: str, two_ranks: list, unbalanced: Epochs) -> None:
    whole = len(unbalanced[0]) - 1
    found = together(two_ranks, name)
    assert found[0][: whole - 4] == unbalanced[0][4:whole]
    assert found[1][:whole] == unbalanced[1][:whole]


@pytest.mark.world_size(2)
def test_one_rank_goes_on_with_a_balanced_epoch_of_two(
    two_ranks: list, root: Path, tokenizer: Any, tokens: np.ndarray, unbalanced: Epochs
) -> None:
    found = read(build(root, tokenizer, tokens), 2, two_ranks[0]["state"])
    whole = len(unbalanced[0]) - 1
    assert found[0][: whole - 3] == unbalanced[0][3:whole]
    assert found[1] == unbalanced[1]


@pytest.mark.world_size(2)
def test_auto_balances_where_all_ranks_find_lengths(two_ranks: list) -> None:
    for found in two_ranks:
        assert found["auto"] == found["balanced"] != found["as drawn"]
        assert found["auto, found by one rank"] == found["as drawn"]
        assert found["auto, found by one rank: imbalance"] is None


@pytest.mark.world_size(2)
def test_a_resumed_run_keeps_the_order_that_it_began_with_whatever_is_measured_now(two_ranks: list) -> None:
    for found in two_ranks:
        assert found["from one rank as drawn, auto"] == found["from one rank as drawn"]
        assert found["from one rank, auto"] == found["from one rank"] != found["from one rank as drawn"]


# ------------------------------------------------------------------------------------------------- by itself

LINES = {
    # what a checkpoint says, whether lengths are there, the YAML: what is done, and the last line that says so
    "begins with lengths": (..., True, "auto", "global", "ranks get equal tokens in each step (global), as measured"),
    "begins without": (..., False, "auto", None, "batches as drawn; found no lengths of this set's samples"),
    "began as drawn": (None, True, "auto", None, "balance=auto: batches as drawn, as this run began"),
    "began otherwise": ("node", True, "auto", "node", "balance=auto: balanced (node), as this run began"),
    "goes on as it began": ("global", True, "auto", "global", "(global), as measured"),
    "goes on as drawn": (None, False, "auto", None, "batches as drawn; found no lengths"),
    "is told to": (None, True, "node", "node", "balance=node, as the YAML says; this run began with null"),
    "is told not to": ("node", False, "null", None, "balance=null, as the YAML says; this run began with node"),
}


@pytest.mark.parametrize("case", LINES)
def test_one_line_says_what_auto_does_and_why(
    case: str, root: Path, tokenizer: Any, tokens: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    began, there, balance, reach, line = LINES[case]
    with caplog.at_level("INFO", "composer_path.batches.balance"):
        dataset = build(root, tokenizer, tokens if there else None, balance=balance).dataset
        state = dataset.state_dict(0, True)
        if began is not ...:
            dataset.load_state_dict(state | {"balance": began})
    assert dataset.state_dict(0, True)["balance"] == reach
    assert line in caplog.messages[-1]


def test_a_run_of_an_earlier_version_goes_on_as_drawn(root: Path, tokenizer: Any, tokens: np.ndarray) -> None:
    dataset = build(root, tokenizer, tokens, balance="auto").dataset
    state = dataset.state_dict(0, True)
    del state["balance"]
    dataset.load_state_dict(state)
    assert dataset.state_dict(0, True)["balance"] is None


def test_a_balanced_run_whose_lengths_are_gone_is_refused_by_name(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer, None, balance="auto").dataset
    state = dataset.state_dict(0, True) | {"balance": "global"}
    message = (
        r"lengths-missing: this run began with balanced ranks \(global\), .*; measure them with composer-path lengths"
    )
    with pytest.raises(StreamError, match=message):
        dataset.load_state_dict(state)


def test_auto_exchanges_within_nodes_where_shards_are_fetched(root: Path, tokenizer: Any, tokens: np.ndarray) -> None:
    dataset = build(root, tokenizer, None).dataset
    dataset.streams[0].remote = "s3://bucket/a"
    dataset.balance_if_measured(lambda: tokens)
    assert dataset.state_dict(0, True)["balance"] == "node"
