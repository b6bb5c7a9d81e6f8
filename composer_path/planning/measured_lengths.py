"""Measures how long each sample of a training YAML's sets is, for balanced batches; images are never read.

Everything that decides a length (tokenizer, template, placeholders of an image, where samples are cut) is taken from
the YAML, as training takes it.
"""

from __future__ import annotations

import inspect
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_path.conversion.destination import INDEX_NAME
from composer_path.records.conversation import Conversation
from composer_path.records.prompts import PromptTemplate, TemplateError
from composer_path.records.tokenize import tokenize_conversation
from composer_path.records.vocabulary import TextEncoder, text_encoder
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
from composer_path.shards.view import (
    DamagedShard,
    ShardView,
    decompressed,
    in_processes,
    name_of,
    stored_info,
)
from composer_path.storage.places import StorageError, open_place

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
        template: Prompt template of its samples.
        num_image_tokens: Placeholders of an image.
        max_seq_len: Where samples are cut, tokens.
        image_position: `front` or `inline`.
        folder: Where its lengths lie; None for beside it.
    """

    where: str
    url: str
    template: PromptTemplate
    num_image_tokens: int
    max_seq_len: int
    image_position: str
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
        settings = (self.template, self.num_image_tokens, self.max_seq_len, self.image_position)
        return lengths_key(index, tokenizer, *settings)


def training_sets(settings: Mapping[str, Any], loaders: tuple[str, ...] | None = None) -> list[TrainingSet]:
    """The sets of a configuration.

    Args:
        settings: The configuration as plain mappings.
        loaders: Which of `LOADERS`; None for those that are balanced.
    """
    if loaders is None:
        loaders = tuple(name for name in LOADERS if (settings.get(name) or {}).get("balance"))
    sections = {name: settings[name] for name in loaders if settings.get(name)}
    if not sections:
        return []
    num_image_tokens = image_tokens_of(settings["model"])
    return [found for name, section in sections.items() for found in _sets_of(name, section, num_image_tokens)]


def _sets_of(name: str, section: Mapping[str, Any], num_image_tokens: int) -> Iterator[TrainingSet]:
    from composer_path.batches.dataset import ConversationDataset
    from composer_path.batches.mixture import template_of

    dataset = section["dataset"]
    defaults = inspect.signature(ConversationDataset.__init__).parameters
    template, max_seq_len, image_position = (
        dataset.get(key, defaults[key].default) for key in ("template", "max_seq_len", "image_position")
    )
    streams = dataset.get("streams") or {"": dataset}
    for stream, keywords in streams.items():
        split = keywords.get("split") or dataset.get("split") or ""
        yield TrainingSet(
            where=f"{name}.dataset.streams.{stream}" if stream else f"{name}.dataset",
            url="/".join(filter(None, (str(keywords.get("remote") or keywords["local"]).rstrip("/"), split))),
            template=template_of(keywords.get("template", template), keywords.get("system")),
            num_image_tokens=num_image_tokens,
            max_seq_len=max_seq_len,
            image_position=image_position,
            folder=section.get("lengths"),
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
    config = load_language_model_config(language_model.get("path") or language_model.get("config"))
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
    from composer_path.records.vocabulary import load_tokenizer

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
        ShardViewError: It can't be read.
        OSError: The lengths can't be written.
    """
    from composer_path.records.vocabulary import load_tokenizer

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
        ShardViewError: It can't be read.
        OSError: The lengths can't be written.
    """
    key, place = found.key(tokenizer), lengths_place(found.url, found.folder)
    if not force and has_lengths(place, key):
        return f"{place}/{key.file_name}", read_lengths(place, key)
    view = ShardView(found.url)
    tasks = [(view, number, found, text_encoder(tokenizer)) for number in range(len(view.shards))]
    report = None if progress is None else progress(len(tasks))
    parts = []
    for part in in_processes(_measure_shard, tasks, workers):
        parts.append(part)
        if report is not None:
            report(len(parts))
    counts = np.concatenate([np.zeros((0, 3), np.int32), *parts])
    lengths = SampleLengths(*(np.ascontiguousarray(column) for column in counts.T))
    return f"{place}/{write_lengths(place, key, lengths)}", lengths


def _measure_shard(task: tuple[ShardView, int, TrainingSet, TextEncoder]) -> np.ndarray:
    view, number, found, encoder = task
    counts = [measure_sample(data, num_images, found, encoder) for data, num_images in texts(view, number)]
    return np.array(counts, np.int32).reshape(-1, 3)


def measure_sample(data: Any, num_images: int, found: TrainingSet, encoder: TextEncoder) -> tuple[int, int, int]:
    """Tokens, answer tokens and images of a sample, as `ConversationDataset` would make it.

    Only that an image can't be decoded isn't seen here: such a sample is shorter than it was measured.
    """
    try:
        conversation = Conversation.from_shard(data, num_images)
    except ValueError:
        return 1, 0, 0
    settings = (found.template, found.num_image_tokens, found.max_seq_len, found.image_position)
    try:
        tokens = tokenize_conversation(conversation, encoder, *settings)
    except TemplateError:
        return 1, 0, 0
    if not tokens.num_answer_tokens:
        return 1, 0, 0
    return len(tokens.input_ids), tokens.num_answer_tokens, tokens.num_images


def texts(view: ShardView, number: int) -> Iterator[tuple[Any, int]]:
    """Yield the conversation column and the number of images of each sample of a shard; images are passed over.

    Raises:
        DamagedShard: It isn't what the index says.
    """
    shard = view.shards[number]
    columns = shard["column_names"]
    with view.open_file(stored_info(shard)["basename"]) as stored:
        file = decompressed(stored, shard) if shard.get("zip_data") else stored
        count = shard["samples"]
        header = _read(file, 4 * (count + 2), shard)
        num_samples, *places = struct.unpack(f"<{count + 2}I", header)
        if num_samples != count:
            raise DamagedShard(f"{name_of(shard)}: its header doesn't fit {count} samples")
        for place in places[:-1]:
            file.seek(place)
            sizes = struct.unpack(f"<{len(columns)}I", _read(file, 4 * len(columns), shard))
            starts = dict(zip(columns, np.cumsum([place + 4 * len(columns), *sizes]).tolist(), strict=False))
            file.seek(starts["conversation"])
            text = _read(file, sizes[columns.index("conversation")], shard)
            file.seek(starts["images"])
            (num_images,) = struct.unpack("<I", _read(file, 4, shard))
            try:
                yield json.loads(text), num_images
            except ValueError as error:  # its message may quote the text
                raise DamagedShard(f"{name_of(shard)}: a sample doesn't decode ({type(error).__name__})") from None


def _read(file: io.IOBase, size: int, shard: Mapping[str, Any]) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise DamagedShard(f"{name_of(shard)}: it ends before its last sample")
    return data
