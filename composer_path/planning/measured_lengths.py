"""Measures how long each sample of a training YAML's sets is, for balanced batches; images are never read.

Everything that decides a length (tokenizer, template, placeholders of an image, where samples are cut) is taken from
the YAML, as training takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_path.parallel import in_processes
from composer_path.records.conversation import Conversation
from composer_path.records.prompts import TemplateError
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import TextEncoder, load_tokenizer, text_encoder
from composer_path.run.preparation import text_of_sources
from composer_path.shards.index import INDEX_NAME
from composer_path.shards.lengths import (
    LengthsError,
    LengthsKey,
    SampleLengths,
    has_lengths,
    lengths_key,
    lengths_place,
    read_lengths,
    write_lengths,
)
from composer_path.shards.view import ShardView
from composer_path.storage.errors import StorageError
from composer_path.storage.places import open_place

if TYPE_CHECKING:
    from composer_path.records.vocabulary import Tokenizer

LOADERS = ("train_loader", "eval_loader")
Progress = Callable[[int], None]  # gets the number of shards that are done


@dataclass(frozen=True)
class TrainingSet:
    """A set of shards as a YAML's loader reads it.

    Attributes:
        where: The YAML's key that names it.
        url: Folder or address of its index.
        text: How its samples are tokenized.
        folder: Where its lengths lie; None for beside it.
    """

    where: str
    url: str
    text: TextPreparation
    folder: str | None = None

    def key(self, tokenizer: Tokenizer) -> LengthsKey:
        """What its lengths depend on.

        Raises:
            LengthsError: There is no index.
        """
        try:
            index = open_place(self.url).read(INDEX_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise LengthsError(f"{self.where}: found no {INDEX_NAME} in '{open_place(self.url)}'") from None
        except StorageError as error:
            raise LengthsError(f"{self.where}: {error}") from None
        return lengths_key(index, tokenizer, self.text)


def training_sets(settings: Mapping[str, Any], loaders: tuple[str, ...] | None = None) -> list[TrainingSet]:
    """The sets of a configuration.

    Args:
        settings: The configuration as plain mappings.
        loaders: Which of `LOADERS`; None for those that are balanced.
    """
    if loaders is None:
        loaders = tuple(name for name in LOADERS if settings[name] and settings[name]["balance"])
    sections = {name: settings[name] for name in loaders if settings[name]}
    if not sections:
        return []
    num_image_tokens = image_tokens_of(settings["model"])
    return [found for name, section in sections.items() for found in _sets_of(name, section, num_image_tokens)]


def _sets_of(name: str, section: Mapping[str, Any], num_image_tokens: int) -> Iterator[TrainingSet]:
    for stream, keywords, text in text_of_sources(section["dataset"], num_image_tokens):
        folder = str(keywords["remote"] or keywords["local"]).rstrip("/")
        yield TrainingSet(
            where=f"{name}.dataset.streams.{stream}" if stream else f"{name}.dataset",
            url="/".join(filter(None, (folder, keywords["split"]))),
            text=text,
            folder=section["lengths"],
        )


def image_tokens_of(model: Mapping[str, Any]) -> int:
    """How many placeholders an image takes; the two modules are built without weights.

    Args:
        model: The YAML's section.
    """
    from composer_path.models.language_model import empty_parameters, load_language_model_config
    from composer_path.models.projector import untrained_projector
    from composer_path.models.vision_encoder import untrained_vision_encoder

    language_model = model["language_model"]
    config = load_language_model_config(language_model["path"] or language_model["config"])
    with empty_parameters(enabled=True):
        vision = untrained_vision_encoder(
            **{key: value for key, value in model["vision_encoder"].items() if key != "weights"}
        )
        sections = {key: value for key, value in model["projector"].items() if key != "weights"}
        projector = untrained_projector(**sections, in_dim=vision.dim, out_dim=config.hidden_size)
    return projector.num_image_tokens(vision.num_tokens(vision.image_size, vision.image_size))


def lengths_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the lengths of a configuration's balanced loaders, one a line, before anything is built."""
    sets = training_sets(settings)
    if not sets:
        return []
    tokenizer, problems = load_tokenizer(**settings["tokenizer"]), []
    for found in sets:
        try:
            read_lengths(lengths_place(found.url, found.folder), found.key(tokenizer))
        except (LengthsError, StorageError) as error:
            problems.append(f"{found.where.partition('.')[0]}.balance: {error}")
    return problems


def measure(
    settings: Mapping[str, Any],
    loaders: tuple[str, ...] | None = None,
    out: str | None = None,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> Iterator[str]:
    """Measure the sets of a configuration and yield a line for each: counts, and where the file lies.

    Args:
        settings: The configuration as plain mappings.
        loaders: Which of `LOADERS`; None for those that are balanced, or the training loader if none is.
        out: Folder or URL of the files; None for what the configuration says.
        workers: Processes.
        force: Measure again what was measured before.
        progress: Makes a set's report from its number of shards.

    Raises:
        LengthsError: There is no such set.
        ShardError: It can't be read.
        OSError: The lengths can't be written.
    """
    tokenizer = load_tokenizer(**settings["tokenizer"])
    for found in training_sets(settings, loaders) or training_sets(settings, LOADERS[:1]):
        found = found if out is None else replace(found, folder=out)
        file, lengths = measure_set(found, tokenizer, workers, force, progress)
        answers = lengths.answer_tokens.sum() / max(1, lengths.tokens.sum())
        yield (
            f"{found.where}: {len(lengths):,} samples, {lengths.tokens.mean():,.1f} tokens each "
            f"({lengths.tokens.min():,} to {lengths.tokens.max():,}), {answers:.1%} of them answers: {file}"
        )


def measure_set(
    found: TrainingSet,
    tokenizer: Tokenizer,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> tuple[str, SampleLengths]:
    """Measure a set and write its lengths, or read them if they are there.

    Args:
        found: The set.
        tokenizer: Of the language model.
        workers: Processes.
        force: Measure again.
        progress: Makes a report from the number of shards.

    Returns:
        The file, and what it holds.

    Raises:
        LengthsError: There is no such set.
        ShardError: It can't be read.
        OSError: The lengths can't be written.
    """
    key, place = found.key(tokenizer), lengths_place(found.url, found.folder)
    if not force and has_lengths(place, key):
        return f"{place}/{key.file_name}", read_lengths(place, key)
    view = ShardView(found.url)
    tasks = [(view, number, found, text_encoder(tokenizer)) for number in range(len(view.shards))]
    report = None if progress is None else progress(len(tasks))
    parts = []
    for part in in_processes(_measure_shard, tasks, workers, fork=True):
        parts.append(part)
        if report is not None:
            report(len(parts))
    counts = np.concatenate([np.zeros((0, 3), np.int32), *parts])
    lengths = SampleLengths(*(np.ascontiguousarray(column) for column in counts.T))
    return f"{place}/{write_lengths(place, key, lengths)}", lengths


def _measure_shard(task: tuple[ShardView, int, TrainingSet, TextEncoder]) -> np.ndarray:
    view, number, found, encoder = task
    counts = [measure_sample(data, num_images, found, encoder) for data, num_images in view.texts(number)]
    return np.array(counts, np.int32).reshape(-1, 3)


def measure_sample(data: Any, num_images: int, found: TrainingSet, encoder: TextEncoder) -> tuple[int, int, int]:
    """Tokens, answer tokens and images of a sample, as `ConversationDataset` would make it.

    Only that an image can't be decoded isn't seen here: such a sample is shorter than it was measured.
    """
    try:
        conversation = Conversation.from_shard(data, num_images)
    except ValueError:
        return 1, 0, 0
    try:
        tokens = found.text.tokenize(conversation, encoder)
    except TemplateError:
        return 1, 0, 0
    if not tokens.num_answer_tokens:
        return 1, 0, 0
    return len(tokens.input_ids), tokens.num_answer_tokens, tokens.num_images
