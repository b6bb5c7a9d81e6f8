"""NEFTune: how large its noise is, where it isn't, and that nothing but the sample decides it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from composer import ComposerModel
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from tiny_samples import mixed_samples

from composer_path.algorithms import Neftune
from composer_path.algorithms.neftune import text_noise
from composer_path.batches.batch import Batch, PackedCollator, split_batch

DIM, ALPHA, KEY = 64, 5.0, 17


def row() -> Batch:
    return PackedCollator()(mixed_samples())


def noise(batch: Batch, key: int = KEY) -> torch.Tensor:
    return text_noise(batch, DIM, ALPHA, key)


def test_noise_is_uniform_within_the_papers_bound_for_each_samples_length() -> None:
    batch = row()
    found = noise(batch)
    for start, stop in zip(batch.cu_seq_lens[:-1].tolist(), batch.cu_seq_lens[1:].tolist(), strict=True):
        bound = ALPHA / ((stop - start) * DIM) ** 0.5
        text = found[start:stop][batch.input_ids[start:stop] >= 0]
        assert text.abs().max() <= bound
        if len(text) > 4:
            assert text.std() == pytest.approx(bound * 3**-0.5, rel=0.15)
            assert abs(text.mean()) < bound / 6


def test_images_vectors_get_none() -> None:
    batch = row()
    assert not noise(batch)[batch.image_index].any()
    assert noise(batch)[batch.input_ids >= 0].any(dim=1).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_noise_is_the_same_however_a_batch_is_split(size: int) -> None:
    batch = row()
    assert torch.equal(torch.cat([noise(part) for part in split_batch(batch, size)]), noise(batch))


def test_a_repetition_and_another_key_get_other_noise() -> None:
    batch = row()
    assert not torch.equal(noise(replace(batch, repetitions=batch.repetitions + 1)), noise(batch))
    assert not torch.equal(noise(batch, KEY + 1), noise(batch))


def test_it_is_made_in_pieces_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise(row())
    monkeypatch.setattr("composer_path.algorithms.neftune._ENTRIES_AT_ONCE", 3 * DIM)
    assert torch.equal(noise(row()), whole)


class Speaker(ComposerModel):
    """As much of the model as has an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.language_model = torch.nn.Module()
        self.model.language_model.embed = torch.nn.Embedding(10, DIM)
        self.model.language_model.get_input_embeddings = lambda: self.model.language_model.embed  # type: ignore

    def forward(self, batch: Any) -> Any:
        return None

    def loss(self, outputs: Any, batch: Any) -> Any:
        return None


def test_the_embedding_is_noisy_in_a_training_pass_only() -> None:
    speaker = Speaker()
    embed = speaker.model.language_model.embed
    batch = row()
    state = State(model=speaker, rank_zero_seed=0, run_name="noise", device=DeviceCPU())
    state.batch = batch
    ids = batch.input_ids.clamp(0, 9)
    clean, algorithm = embed(ids), Neftune(ALPHA)
    algorithm.apply(Event.BEFORE_FORWARD, state, Logger(state))
    assert not torch.equal(embed(ids), clean)
    algorithm.apply(Event.AFTER_FORWARD, state, Logger(state))
    assert torch.equal(embed(ids), clean)
    assert algorithm.match(Event.AFTER_FORWARD, state) and not algorithm.match(Event.EVAL_BEFORE_FORWARD, state)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e4])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="neftune: alpha must be above 0"):
        Neftune(alpha)
