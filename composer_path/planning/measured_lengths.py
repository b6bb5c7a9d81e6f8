"""How long each sample of a training YAML's sets is, for balanced batches; images are never read.

Everything that decides a length (tokenizer, template, placeholders of an image, where samples are cut) is taken from
the YAML, as training takes it. Measured from shards, or asked of the conversion that writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from composer_path.batches.balance import Reach
from composer_path.batches.measure import UNUSABLE, Measure, lengths_key
from composer_path.batches.mixture import given, template_of
from composer_path.conversion.sample_lengths import WantedLengths
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import Tokenizer, load_tokenizer, text_encoder
from composer_path.run.preparation import text_of
from composer_path.shards.index import INDEX_NAME
from composer_path.shards.lengths import (
    LengthsError,
    LengthsKey,
    SampleLengths,
    has_lengths,
    lengths_place,
    read_lengths,
    write_lengths,
)
from composer_path.shards.view import ShardView, over_shards
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Folder, open_place

LOADERS = ("train_loader", "eval_loader")
Progress = Callable[[int], None]  # gets the number of shards that are done


@dataclass(frozen=True)
class TrainingSet:
    """A set of shards as a YAML's loader reads it."""

    where: str  # the YAML's key that names it
    url: str  # folder or address of its index
    text: TextPreparation
    folder: str | None  # where its lengths lie; None for beside it

    def key(self, tokenizer: Tokenizer) -> LengthsKey:
        """What its lengths depend on; a `LengthsError` where there is no index."""
        try:
            index = open_place(self.url).read(INDEX_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise LengthsError(f"{self.where}: found no {INDEX_NAME} in '{open_place(self.url)}'") from None
        except StorageError as error:
            raise LengthsError(f"{self.where}: {error}") from None
        return lengths_key(tokenizer, self.text).of_set(index)


def training_sets(settings: Mapping[str, Any], loaders: tuple[str, ...] | None = None) -> list[TrainingSet]:
    """The sets of a configuration's `LOADERS`; None for those of them that must be balanced."""
    if loaders is None:
        loaders = tuple(name for name in LOADERS if settings[name] and settings[name]["balance"] in get_args(Reach))
    sections = {name: settings[name] for name in loaders if settings[name]}
    num_image_tokens = image_tokens_of(settings["model"]) if sections else 0
    sets = []
    for name, section in sections.items():
        dataset = section["dataset"]
        for stream, own in (dataset["streams"] or {"": {}}).items():
            keywords = {**dataset, **given(own)}
            text = text_of(dataset, template_of(keywords["template"], own.get("system")), num_image_tokens)
            folder = str(keywords["remote"] or keywords["local"]).rstrip("/")
            url = "/".join(filter(None, (folder, keywords["split"])))
            where = f"{name}.dataset.streams.{stream}" if stream else f"{name}.dataset"
            sets.append(TrainingSet(where, url, text, section["lengths"]))
    return sets


def image_tokens_of(model: Mapping[str, Any]) -> int:
    """How many placeholders an image takes by the YAML's section; the two modules are built without weights."""
    from composer_path.models.language_model import load_language_model_config
    from composer_path.models.parameters import empty_parameters
    from composer_path.models.projector import untrained_projector
    from composer_path.models.vision_encoder import untrained_vision_encoder

    language_model = model["language_model"]
    config = load_language_model_config(language_model["path"] or language_model["config"])
    sections = {name: dict(model[name]) for name in ("vision_encoder", "projector")}
    for section in sections.values():
        section.pop("weights")
        section.pop("pooler_weights", None)
    with empty_parameters(enabled=True):
        vision = untrained_vision_encoder(**sections["vision_encoder"])
        projector = untrained_projector(**sections["projector"], in_dim=vision.dim, out_dim=config.hidden_size)
    return projector.num_image_tokens(vision.num_tokens(vision.image_size, vision.image_size))


def wanted_lengths(settings: Mapping[str, Any], out: str) -> list[WantedLengths]:
    """What a conversion to a place is to count: the lengths that the loaders which read that place will look for.

    Raises:
        LengthsError: None reads it.
    """
    sets, here = training_sets(settings, LOADERS), _where_it_lies(out)
    tokenizer = load_tokenizer(**settings["tokenizer"])
    wanted: dict[tuple[LengthsKey, str | None], WantedLengths] = {}  # train and eval may read alike
    for found in sets:
        if _where_it_lies(found.url) == here:
            key, measure = lengths_key(tokenizer, found.text), Measure(found.text, text_encoder(tokenizer))
            measure(
                Conversation(turns=(Turn("human", "?"), Turn("assistant", "!")))
            )  # else the first record would fail
            wanted[key, found.folder] = WantedLengths(key, measure, found.folder)
    if not wanted:
        read = ", ".join(str(open_place(found.url)) for found in sets)
        raise LengthsError(
            f"--lengths: must name a YAML that reads --out {open_place(out)}, found one that reads {read}; "
            "add the key that says so, such as train_loader.dataset.local=OUT"
        )
    return list(wanted.values())


def _where_it_lies(url: str) -> str:
    place = open_place(url)
    return os.path.realpath(place.path) if isinstance(place, Folder) else place.url.rstrip("/")


def lengths_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the lengths of a configuration's balanced loaders, one a line, before anything is built."""
    sets, problems = training_sets(settings), []
    tokenizer: Any = load_tokenizer(**settings["tokenizer"]) if sets else None
    for found in sets:
        try:
            read_lengths(lengths_place(found.url, found.folder), found.key(tokenizer))
        except (LengthsError, StorageError) as error:
            problems.append(f"{found.where.partition('.')[0]}.balance: {error}")
    return problems


def measure(
    settings: Mapping[str, Any],
    loaders: tuple[str, ...] | None,
    out: str | None,
    workers: int,
    force: bool,
    progress: Callable[[int], Progress],
) -> Iterator[str]:
    """Measure the sets of a configuration and yield a line for each: counts, and where the file lies.

    Without `loaders`: of those that must be balanced, or of the training loader if none must. Files lie in `out` (a
    folder or URL), or where the configuration says. `progress` makes a set's report from its number of shards.

    Raises:
        LengthsError: There is no such set.
        ShardError: It can't be read.
        OSError: The lengths can't be written.
    """
    tokenizer = load_tokenizer(**settings["tokenizer"])
    for found in training_sets(settings, loaders) or training_sets(settings, LOADERS[:1]):
        place = lengths_place(found.url, found.folder if out is None else out)
        key = found.key(tokenizer)
        if force or not has_lengths(place, key):
            write_lengths(place, key, _measure_set(found, tokenizer, workers, progress))
        lengths = read_lengths(place, key)
        answers = lengths.answer_tokens.sum() / max(1, lengths.tokens.sum())
        yield (
            f"{found.where}: {len(lengths):,} samples, {lengths.tokens.mean():,.1f} tokens each "
            f"({lengths.tokens.min():,} to {lengths.tokens.max():,}), {answers:.1%} of them answers: "
            f"{place}/{key.file_name}"
        )


def _measure_set(
    found: TrainingSet, tokenizer: Tokenizer, workers: int, progress: Callable[[int], Progress]
) -> SampleLengths:
    view = ShardView(found.url)
    how, report = Measure(found.text, text_encoder(tokenizer)), progress(len(view.shards))
    parts = [np.zeros((0, 3), np.int32), *over_shards(_measure_shard, view, how, workers, report)]
    return SampleLengths(*(np.ascontiguousarray(column) for column in np.concatenate(parts).T))


def _measure_shard(task: tuple[ShardView, int, Measure]) -> np.ndarray:
    view, number, measure = task
    counts = [_measure_sample(measure, data, num_images) for data, num_images in view.texts(number)]
    return np.array(counts, np.int32).reshape(-1, 3)


def _measure_sample(measure: Measure, data: Any, num_images: int) -> tuple[int, int, int]:
    try:
        conversation = Conversation.from_shard(data, num_images)
    except ValueError:  # the shard is damaged here
        return UNUSABLE
    return measure(conversation)
