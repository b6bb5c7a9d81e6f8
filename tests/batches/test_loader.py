"""Claims about the loader: microbatches within their limits and equal in number on all ranks, order, and resuming."""

from __future__ import annotations

import json
import math
import random
import socket
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from composer.core import DataSpec
from forked_ranks import join_two_ranks

from composer_path import IGNORE_INDEX
from composer_path.batches.batch import Batch, EmptyBatchError, PackedCollator, Sample, split_batch
from composer_path.batches.loader import build_dataloader
from composer_path.conversion.convert import convert
from composer_path.records.vocabulary import load_tokenizer

NUM_RECORDS = 23  # five batches of four and a last one of three
BATCH_SIZE = 4
NUM_BATCHES = math.ceil(NUM_RECORDS / BATCH_SIZE)


def text_sample(sample_id: int, length: int, answer: int, problem: str | None = None) -> Sample:
    input_ids = torch.arange(length)
    labels = torch.where(input_ids >= length - answer, input_ids, IGNORE_INDEX)
    no_images = torch.empty((0, 3, 2, 2), dtype=torch.uint8)
    is_he = torch.empty(0, dtype=torch.bool)
    return Sample(
        sample_id=sample_id,
        input_ids=input_ids,
        labels=labels,
        pixel_values=no_images,
        is_he=is_he,
        source="all",
        problem=problem,
    )


def text_batch(lengths: list[int], limit: int | None = None, answer: int = 2) -> Batch:
    return PackedCollator(limit)([text_sample(index, length, answer) for index, length in enumerate(lengths)])


# ---------------------------------------------------------------------------------------------- microbatches


@pytest.mark.parametrize("microbatch_size", [1, 3, 20])
def test_microbatches_keep_both_limits_and_hold_the_row_in_order(microbatch_size: int) -> None:
    draw = random.Random(microbatch_size)
    for _ in range(20):
        lengths = [draw.randint(3, 90) for _ in range(20)]
        batch = text_batch(lengths, limit=100)
        microbatches = split_batch(batch, microbatch_size)
        assert all(len(part.input_ids) <= 100 for part in microbatches)
        assert all(1 <= len(part.sample_ids) <= microbatch_size for part in microbatches)
        for key in ("sample_ids", "input_ids", "targets"):
            assert torch.equal(torch.cat([getattr(part, key) for part in microbatches]), getattr(batch, key))
        if microbatch_size == 20:
            assert [len(part.sample_ids) for part in microbatches] == batch.samples_per_bin


def test_a_batch_without_a_token_limit_is_one_microbatch() -> None:
    assert len(split_batch(text_batch([50, 900, 3]), 3)) == 1


def test_a_batch_that_was_split_can_be_split_again() -> None:
    (part, *_) = split_batch(text_batch([10] * 6), 4)
    assert [part.sample_ids.tolist() for part in split_batch(part, 3)] == [[0, 1, 2], [3]]


# ---------------------------------------------------------------------------------------------- two ranks


def rank_answers(rank: int, port: int, folder: Path, tokenizer: Any, all_done: Any) -> None:
    """What a rank sees, written as JSON; runs in a process of its own."""
    join_two_ranks(rank, port)
    batches = {
        "one bin against three": text_batch([[30] * 4, [90, 80, 70, 10]][rank], limit=100),
        "no answer here": text_batch([[30] * 4, [90, 80, 70, 10]][rank], limit=100, answer=2 * rank),
        "no answer anywhere": text_batch([20] * 4, answer=0),
    }
    found: dict[str, Any] = {}
    for name, batch in batches.items():
        try:
            found[name] = [part.sample_ids.tolist() for part in split_batch(batch, 4)]
        except EmptyBatchError as error:
            found[name] = str(error)
    try:
        build_loader(Path("nowhere"), tokenizer, global_batch_size=7)
    except ValueError as error:
        found["uneven"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    all_done.wait(60)
    # The group isn't destroyed: torch 2.7 holds Python's lock while it waits for gloo's thread, which may need it to
    # free the last tensor, and neither goes on. A forked process leaves without it.


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


@pytest.fixture(scope="module")
def two_ranks(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Forked, because a new process would import everything again.
    all_done = torch.multiprocessing.get_context("fork").Barrier(2)
    arguments = (port, folder, tokenizer, all_done)
    ranks = torch.multiprocessing.start_processes(rank_answers, arguments, nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + 120
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in ranks.processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_with_different_bins_make_equally_many_microbatches(two_ranks: list) -> None:
    first, second = (found["one bin against three"] for found in two_ranks)
    assert len(text_batch([30] * 4, limit=100).samples_per_bin) == 2
    assert len(first) == len(second) == 3
    assert first == [[0], [2], [1, 3]]  # its row is 0 2 | 1 3
    assert sorted(sample_id for part in second for sample_id in part) == [0, 1, 2, 3]


def test_a_rank_without_an_answer_goes_along_with_the_others(two_ranks: list) -> None:
    assert [len(found["no answer here"]) for found in two_ranks] == [3, 3]


def test_all_ranks_refuse_a_batch_without_any_answer(two_ranks: list) -> None:
    for found in two_ranks:
        assert "no answer token at all (samples [0, 1, 2, 3] here)" in found["no answer anywhere"]


def test_ranks_must_divide_the_global_batch(two_ranks: list) -> None:
    for found in two_ranks:
        assert found["uneven"].startswith("global_batch_size=7 can't be divided by 2 ranks; take 6")


# ---------------------------------------------------------------------------------------------- real shards


@pytest.fixture(scope="module")
def records(repo_root: Path) -> list[dict[str, Any]]:
    """Some with one image, some with two, some with none."""
    everything = json.loads((repo_root / "test_data" / "data.json").read_text(encoding="utf-8"))
    without = [record for record in everything if "image" not in record][:5]
    return [*everything[: NUM_RECORDS - 5], *without]


@pytest.fixture(scope="module")
def shards(records: list, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    # Small shards, so that the order crosses their borders.
    convert(folder / "data.json", repo_root / "test_data" / "imgs", folder / "shards", size_limit="64kb")
    return folder / "shards"


def build_loader(shards: Path, tokenizer: Any, dataset: dict[str, Any] | None = None, **keywords: Any) -> DataSpec:
    section = {"local": str(shards), "template": "llava_llama_2", "shuffle": True, "shuffle_seed": 3}
    section |= {"num_canonical_nodes": 1, "max_seq_len": 512} | (dataset or {})
    settings = {"global_batch_size": BATCH_SIZE, "max_tokens_per_microbatch": 512, "num_workers": 0} | keywords
    model = {"num_image_tokens": 4, "image_size": 28, "mean": (0.5, 0.25, 0.75)}
    return build_dataloader(dataset=section, tokenizer=tokenizer, **model, **settings)


Epochs = list[list[list[int]]]  # epochs, batches, sample ids


def stream(
    shards: Path, tokenizer: Any, num_workers: int, state: dict | None = None
) -> Iterator[tuple[Any, list[int]]]:
    """A loader's dataset and the sample ids of a batch, again and again; no ids at the end of an epoch."""
    spec = build_loader(shards, tokenizer, num_workers=num_workers)
    dataset = spec.dataloader.dataset
    if state is not None:
        dataset.load_state_dict(state)
    try:
        while True:
            for batch in spec.dataloader:
                yield dataset, sorted(batch.sample_ids.tolist())
            yield dataset, []
    finally:
        spec.dataloader._iterator = None  # ends the workers; the garbage collector would wait 5 s for each


def take(batches: Iterator[tuple[Any, list[int]]], num_epochs: int) -> Epochs:
    epochs: Epochs = [[]]
    for _, sample_ids in batches:
        if sample_ids:
            epochs[-1].append(sample_ids)
        elif len(epochs) == num_epochs:
            return epochs
        else:
            epochs.append([])
    raise AssertionError


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tokenizer: Any) -> Epochs:
    """Three epochs without workers and without a break."""
    return take(stream(shards, tokenizer, 0), 3)


def test_every_epoch_holds_all_samples_once_in_its_own_order(undisturbed: Epochs) -> None:
    for batches in undisturbed:
        assert [len(batch) for batch in batches] == [BATCH_SIZE] * (NUM_BATCHES - 1) + [3]
        assert sorted(sample_id for batch in batches for sample_id in batch) == list(range(NUM_RECORDS))
    assert undisturbed[0] != undisturbed[1] != undisturbed[2] != undisturbed[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_order_is_the_same_for_any_number_of_workers(
    num_workers: int, undisturbed: Epochs, shards: Path, tokenizer: Any
) -> None:
    assert take(stream(shards, tokenizer, num_workers), 2) == undisturbed[:2]


# (batches done, in epoch, workers before, workers after)
RESUMES = {
    "mid-epoch": (2, 0, 0, 0),
    "mid-epoch, with workers": (3, 0, 2, 2),
    "mid-epoch, with other workers": (3, 0, 2, 1),
    "first batch of the second epoch": (1, 1, 0, 0),
    "second epoch, workers added": (4, 1, 0, 2),
    "last batch": (NUM_BATCHES, 0, 0, 0),
    "last batch, with workers": (NUM_BATCHES, 0, 2, 2),
    "epoch end": (0, 1, 0, 0),
    "epoch end, workers taken away": (0, 1, 2, 0),
    "second epoch's end": (0, 2, 0, 2),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_goes_on_exactly_where_it_stopped(name: str, undisturbed: Epochs, shards: Path, tokenizer: Any) -> None:
    done, epoch, workers_before, workers_after = RESUMES[name]
    batches = stream(shards, tokenizer, workers_before)
    for _ in range(epoch * (NUM_BATCHES + 1) + done):  # an epoch's end counts as one more
        dataset, _ = next(batches)
    num_samples = min(done * BATCH_SIZE, NUM_RECORDS)
    state = json.loads(json.dumps(dataset.state_dict(num_samples, True)))  # what Composer asks for and stores
    batches.close()
    rest = [undisturbed[epoch][done:], *undisturbed[epoch + 1 :]]
    assert take(stream(shards, tokenizer, workers_after, state), len(rest)) == rest


def test_a_resumed_run_can_be_resumed(undisturbed: Epochs, shards: Path, tokenizer: Any) -> None:
    state = None
    found = []
    for step in range(1, NUM_BATCHES + 2):  # one batch a run, past the end of the epoch
        dataset, sample_ids = next(batches := stream(shards, tokenizer, 0, state))
        if step <= NUM_BATCHES:
            state = dataset.state_dict(min(step * BATCH_SIZE, NUM_RECORDS), True)
        found.append(sample_ids)
        batches.close()
    assert found == [*undisturbed[0], []]


def test_canonical_nodes_that_do_not_divide_the_samples_repeat_none(shards: Path, tokenizer: Any) -> None:
    spec = build_loader(shards, tokenizer, {"num_canonical_nodes": 8})
    found = [sample_id for batch in spec.dataloader for sample_id in batch.sample_ids.tolist()]
    assert sorted(found) == list(range(NUM_RECORDS))


def test_drop_last_leaves_the_smaller_batch_out(shards: Path, tokenizer: Any, undisturbed: Epochs) -> None:
    spec = build_loader(shards, tokenizer, drop_last=True)
    assert [sorted(batch.sample_ids.tolist()) for batch in spec.dataloader] == undisturbed[0][:-1]


def test_samples_and_tokens_are_counted_for_composer(shards: Path, tokenizer: Any) -> None:
    for loss_average, weight in (("token", lambda batch: len(batch.targets)), ("sample", lambda batch: BATCH_SIZE)):
        spec = build_loader(shards, tokenizer, loss_average=loss_average, max_tokens_per_microbatch=600)
        batch = next(iter(spec.dataloader))
        assert spec.get_num_samples_in_batch(batch) == BATCH_SIZE
        assert spec.get_num_tokens_in_batch(batch) == len(batch.input_ids) > 100
        loss_tokens = spec.get_num_tokens_in_batch(batch, token_type="loss_generating")
        assert loss_tokens == pytest.approx(weight(batch)) == pytest.approx(float(batch.target_weights.sum()))
        parts = spec.split_batch(batch, BATCH_SIZE)
        assert sum(spec.get_num_samples_in_batch(part) for part in parts) == BATCH_SIZE
        assert sum(spec.get_num_tokens_in_batch(part) for part in parts) == len(batch.input_ids)
        part_tokens = [spec.get_num_tokens_in_batch(part, token_type="loss_generating") for part in parts]
        assert sum(part_tokens) == pytest.approx(loss_tokens)


def test_padding_has_the_colour_of_the_encoders_mean(shards: Path, tokenizer: Any) -> None:
    spec = build_loader(shards, tokenizer)
    assert spec.dataloader.dataset.images.pad_color == (127, 63, 191)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_an_answer_names_its_samples_and_no_text(
    num_workers: int, shards: Path, tokenizer: Any, records: list
) -> None:
    dataset = {"max_seq_len": 8, "shuffle": False}
    spec = build_loader(shards, tokenizer, dataset, num_workers=num_workers, persistent_workers=False)
    batch = next(iter(spec.dataloader))
    with pytest.raises(
        EmptyBatchError, match=r"4 samples .* \(samples \[0, 1, 2, 3\] here: no answer is left"
    ) as caught:
        spec.split_batch(batch, BATCH_SIZE)
    words = {word for record in records for turn in record["conversations"] for word in turn["value"].split()}
    texts = [turn["value"] for record in records for turn in record["conversations"] if " " in turn["value"]]
    assert len(words) > 50
    assert [text for text in texts if text in str(caught.value)] == []
    assert [record["id"] for record in records if record["id"] in str(caught.value)] == []


def test_a_microbatch_must_have_room_for_the_longest_sample(shards: Path, tokenizer: Any) -> None:
    message = "max_tokens_per_microbatch=511 is less than dataset.max_seq_len=512"
    with pytest.raises(ValueError, match=message):
        build_loader(shards, tokenizer, max_tokens_per_microbatch=511)
    build_loader(shards, tokenizer, max_tokens_per_microbatch=512)
    build_loader(shards, tokenizer, max_tokens_per_microbatch=None)
    with pytest.raises(ValueError, match=r"is less than dataset[.]max_seq_len=4096"):  # where the default is meant
        build_dataloader(
            dataset={"local": str(shards)},
            global_batch_size=1,
            max_tokens_per_microbatch=4095,
            tokenizer=tokenizer,
            num_image_tokens=4,
            image_size=28,
            mean=(0.5, 0.5, 0.5),
        )


@pytest.mark.parametrize(("num_workers", "persistent"), product([0, 1], [True, False]))
def test_settings_of_workers_fit_any_number_of_them(
    num_workers: int, persistent: bool, shards: Path, tokenizer: Any
) -> None:
    spec = build_loader(shards, tokenizer, num_workers=num_workers, persistent_workers=persistent, timeout=30.0)
    assert spec.dataloader.num_workers == num_workers
    assert spec.dataloader.persistent_workers is (persistent and num_workers > 0)
    assert spec.dataloader.batch_size == spec.dataloader.dataset.batch_size == BATCH_SIZE
