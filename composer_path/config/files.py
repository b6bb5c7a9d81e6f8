"""What must lie on the disk before a run starts, looked up before anything is built: all that is missing is listed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streaming.base.util import number_abbrev_to_int

from composer_path.batches.mixture import template_of
from composer_path.images.features import FeaturesError, common_features
from composer_path.images.levels import LevelsError, common_levels
from composer_path.models.language_model import load_language_model_config
from composer_path.models.language_types import check_length_supported
from composer_path.models.pattern import learning_modules
from composer_path.planning.measured_lengths import lengths_problems
from composer_path.records.chat_template import FIXED_DATE, render_around
from composer_path.records.prompts import ChatTemplate
from composer_path.records.vocabulary import check_vocabulary, load_tokenizer
from composer_path.run.evaluations import loader_sections
from composer_path.run.names import named_classes
from composer_path.run.place import checkpoints_of
from composer_path.shards.index import INDEX_NAME
from composer_path.storage.places import Bucket, is_remote
from composer_path.stream.order import stream_shares
from composer_path.weights.assembly import assemble_model

Settings = Mapping[str, Any]  # a configuration, or a section of it, complete and plain


def check_files(settings: Settings) -> list[str]:
    """Problems of the files that a configuration names, and of what is in them: all that can be seen unbuilt."""
    loaders = loader_sections(settings)
    problems: list[str] = []
    for name, loader in loaders.items():
        missing = list(_missing_shards(name, loader))
        problems += missing or [
            *_epoch_problems(name, loader),
            *_feature_problems(settings, name, loader),
            *_level_problems(name, loader),
        ]
    problems += [*_tokenizer_problems(settings, loaders), *_earlier_results(settings)]
    if os.environ.get("RANK", "0") == "0":  # only rank 0 reads weights
        problems += _missing_weights(settings["model"])
    return problems or [*_model_problems(settings, loaders)] or lengths_problems(settings)


def samples_left_out(settings: Settings) -> Iterator[str]:
    """A line for each loader whose epochs leave samples out, with how many; of sets that lie here, on rank 0."""
    for name, loader in loader_sections(settings).items() if os.environ.get("RANK", "0") == "0" else ():
        samples = (loader and loader["drop_last"] and _samples_of_an_epoch(loader)) or 0
        if left_out := samples and samples % loader["global_batch_size"]:
            yield f"{name}: {left_out:,} of an epoch's {samples:,} samples are left out (drop_last wants whole batches)"


def _sets(name: str, loader: Settings) -> Iterator[tuple[str, Settings, Path | None]]:
    """Each set of a loader: its path in the YAML, its keywords, and its index; None where that is fetched."""
    dataset = loader["dataset"]
    streams = {f"{name}.dataset.streams.{key}": stream for key, stream in (dataset["streams"] or {}).items()}
    for where, keywords in (streams or {f"{name}.dataset": dataset}).items():
        fetched = keywords["remote"] or is_remote(keywords["local"])
        split = keywords["split"] or dataset["split"] or ""
        yield where, keywords, None if fetched else Path(keywords["local"], split, INDEX_NAME)


def _missing_shards(name: str, loader: Settings) -> Iterator[str]:
    for where, _, index in _sets(name, loader):
        if index is not None and not index.is_file():
            fix = (
                f"write shards there with composer-path convert --out {index.parent}, or name the folder that has them"
            )
            yield f"{where}.local: found no {INDEX_NAME} in '{index.parent}'; {fix}"


def _tokenizer_problems(settings: Settings, loaders: Settings) -> Iterator[str]:
    path = settings["tokenizer"]["path"]
    if not Path(path).expanduser().exists():
        yield f"tokenizer.path: found no '{path}'; give a folder or file of a tokenizer"
        return
    try:
        tokenizer = load_tokenizer(**settings["tokenizer"])
    except Exception as error:  # the tokenizers library raises bare ones
        why = str(error).partition("\n")[0].removeprefix("tokenizer.path: ")
        yield f"tokenizer.path: '{path}' can't be read: {why or type(error).__name__}"
        return
    language_model = settings["model"]["language_model"]
    if not language_model["resize_embeddings"] and (known := _vocab_size(language_model)) is not None:
        try:
            check_vocabulary(tokenizer, known)
        except ValueError as error:
            yield str(error)
    asking = [
        where
        for name, loader in loaders.items()
        for where, keywords, _ in _sets(name, loader)
        if template_of(keywords["template"] or loader["dataset"]["template"]).name == ChatTemplate.name
    ]
    if asking and not getattr(tokenizer, "chat_template", None):
        hint = "take a tokenizer that has one, or another template, such as llava_llama_2"
        yield f"{asking[0]}.template: found no chat template in tokenizer.path '{path}'; {hint}"
    elif asking:
        try:
            render_around(["user", "assistant"], tokenizer, FIXED_DATE)
        except ValueError as error:
            yield f"{asking[0]}.template: {error}"


def _vocab_size(language_model: Settings) -> int | None:
    """What a language model's configuration says; None where it can't be read, which is said elsewhere."""
    try:
        return getattr(
            load_language_model_config(language_model["path"] or language_model["config"]), "vocab_size", None
        )
    except (ValueError, OSError):
        return None


def _missing_weights(model: Settings) -> Iterator[str]:
    # Stage 1 has nothing before it that could have made a projector.
    first = "give null to start from random weights" if learning_modules(model) == ["projector"] else None
    fixes = {"projector": first or "run stage 1 first, or give its projector.safetensors"}
    keys = [("vision_encoder", "weights"), ("projector", "weights"), ("projector", "pooler_weights")]
    for name, key in (*keys, ("language_model", "path")):
        path = model[name][key]
        if path is not None and not _is_there(path):
            yield f"model.{name}.{key}: found no '{path}'; {fixes.get(name, 'check the path')}"
    if (path := model["language_model"]["path"]) is not None and Path(path, "config.json").is_file():
        try:
            load_language_model_config(path)
        except ValueError as error:
            yield f"model.language_model.path: {str(error).splitlines()[0]}"


def _is_there(path: str) -> bool:
    """Whether a file or folder is there; in a bucket, a file."""
    if not is_remote(path):
        return Path(path).exists()
    folder, _, name = path.rpartition("/")
    try:
        return Bucket(folder).size(name) >= 0
    except FileNotFoundError:
        return False


def _model_problems(settings: Settings, loaders: Settings) -> Iterator[str]:
    """What keeps a model from being built, or from samples so long: all is built once, without storage for weights."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        # As if for a machine like this one: the kernel is chosen where it trains.
        model = assemble_model(**{**settings["model"], "attention": "sdpa"}, empty=True)
        for name, loader in loaders.items():
            longest = max(loader["dataset"]["max_seq_len"], settings["execution"]["row_multiple"] or 0)
            try:
                check_length_supported(model.language_model.config, longest)
            except ValueError as error:
                yield f"{name}.dataset.max_seq_len: {error}"
    except ValueError as error:
        yield str(error)
    except Exception as error:  # of timm, open_clip and transformers, for sizes that don't go together
        why = " ".join(str(error).split())
        yield f"model: can't be built of these sizes: {type(error).__name__}: {why}; correct the last one changed"


def _earlier_results(settings: Settings) -> Iterator[str]:
    trainer = settings["trainer"]
    path = trainer["load_path"]
    if path is not None and "{" not in path and not is_remote(path) and not Path(path).exists():
        yield f"trainer.load_path: found no '{path}'; give a checkpoint, or null to start anew"
    meant = trainer["autoresume"] or trainer["save_overwrite"] or trainer["save_interval"] is None
    if not meant and (folder := checkpoints_of(settings["save_root"], trainer["run_name"])).names():
        fix = "choose another run_name or save_root, or go on where it was with trainer.autoresume=true"
        yield f"trainer.run_name: found checkpoints of an earlier run in '{folder}'; {fix}"


def _epoch_problems(name: str, loader: Settings) -> Iterator[str]:
    try:
        samples = _samples_of_an_epoch(loader)
    except ValueError as error:  # streams whose shares don't go together
        yield f"{name}.dataset: {error}"
        return
    if samples is None:
        return
    batch, nodes = loader["global_batch_size"], loader["dataset"]["num_canonical_nodes"]
    if loader["drop_last"] and samples < batch:
        few = f"for which the {samples:,} samples of an epoch are too few (drop_last wants whole batches)"
        yield f"{name}.global_batch_size: found {batch}, {few}: it would have no step; lower it or change that"
    if nodes is not None and nodes > samples:
        fix = f"give at most {samples:,}, or leave it out"
        yield f"{name}.dataset.num_canonical_nodes: found {nodes}, and an epoch has {samples:,} samples; {fix}"


def _samples_of_an_epoch(loader: Settings) -> int | None:
    """How many they are before `drop_last`; None where a set's size isn't known here."""
    sizes, wanted = [], []
    for _, keywords, index in _sets("", loader):
        if index is None:
            return None
        try:
            sizes.append(sum(shard["samples"] for shard in json.loads(index.read_bytes())["shards"]))
        except (ValueError, KeyError, TypeError):
            return None  # an index that is none, which is refused by name when it is read
        wanted.append({key: keywords.get(key) for key in ("proportion", "repeat", "choose")})
    if not all(sizes):
        return None  # a set without a sample, which is refused when it is read
    epoch_size = loader["dataset"]["epoch_size"]
    return sum(stream_shares(sizes, wanted, None if epoch_size is None else number_abbrev_to_int(epoch_size)))


def _level_problems(name: str, loader: Settings) -> Iterator[str]:
    """Sets whose dark 16-bit pictures were read in two ways."""
    found = {where: index.read_bytes() for where, _, index in _sets(name, loader) if index is not None}
    try:
        common_levels(found, loader["dataset"]["scale_levels"])
    except LevelsError as error:
        yield f"{name}.dataset: {error}"


def _feature_problems(settings: Settings, name: str, loader: Settings) -> Iterator[str]:
    """Stored features that this run can't use; whether the weights are theirs is seen when the encoder is built."""
    found = {where: index.read_bytes() for where, _, index in _sets(name, loader) if index is not None}
    try:
        stored = common_features(found) if found else None
    except FeaturesError as error:
        yield f"{name}.dataset: {error}"
        return
    if stored is None:
        return
    if "vision_encoder" in learning_modules(settings["model"]):
        yield f"model.trainable: vision_encoder can't learn from {name}, which holds its features; train on images"
    for algorithm in settings["algorithms"] if name == "train_loader" else ():
        if getattr(named_classes("algorithms")[algorithm], "changes_images", False):
            yield f"algorithms.{algorithm}: changes images, and {name} holds features of them; leave out one of the two"
    for key in ("fit", "decoder"):
        if (here := loader["dataset"][key]) != (stored_with := getattr(stored, key)):
            yield f"{name}.dataset.{key}: found {here}; the features there were made with {stored_with}: take that"
