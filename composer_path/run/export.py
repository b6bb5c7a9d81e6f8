"""What a run leaves for others: projector files, a model folder, and both again from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.asking.processor_config import write_processor_config
from composer_path.config.reading import plain
from composer_path.images.pixels import ImagePreparation
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer, save_tokenizer
from composer_path.run.checkpoint_safety import METADATA, is_harmless, read_pickle
from composer_path.run.checkpoints import frozen_names
from composer_path.run.preparation import asking_text, images_of
from composer_path.run.sharding import held_as, settle_precision
from composer_path.weights.assembly import assemble_model
from composer_path.weights.folder import write_json
from composer_path.weights.model_folder import PathMLLM
from composer_path.weights.projector_file import REFERENCE_BIN, SAFETENSORS, save_mm_projector, save_projector

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_projector(folder: Path, model: PathMLLM, weights: Mapping[str, Tensor]) -> None:
    """Write the projector for the next stage, and in the reference's file format, beside the model's configuration.

    Args:
        folder: Made if needed.
        model: Its configuration and its projector's.
        weights: Gathered tensors by the model's names; only the projector's are used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key.removeprefix("projector."): value for key, value in weights.items() if key.startswith("projector.")}
    for name, save in ((SAFETENSORS, save_projector), (REFERENCE_BIN, save_mm_projector)):
        partial = folder / f"{name}.partial"
        save(partial, model.projector, state)
        partial.replace(folder / name)
    write_json(folder / "config.json", model.config())


def write_model(
    folder: Path,
    model: PathMLLM,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    text: TextPreparation,
    images: ImagePreparation,
    dtype: str | None = None,
) -> None:
    """Write everything that `composer-path ask` needs: weights, configuration, tokenizer, how inputs are prepared."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype of written weights: unknown '{dtype}'; choose one of {', '.join(DTYPES)}")
    tensors = {
        key: value if dtype is None or not value.is_floating_point() else value.to(DTYPES[dtype])
        for key, value in weights.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    write_processor_config(folder, text, images)
    model.save_pretrained(folder, state_dict=tensors)


def read_checkpoint(checkpoint: Path, names: set[str]) -> dict[str, Tensor]:
    """The model's tensors of a Composer checkpoint, a sharded folder or a single file, on one CPU process.

    Args:
        checkpoint: As named by Composer, or its `latest` link.
        names: Tensors to take, by the model's names.

    Raises:
        ValueError: Not a checkpoint, or tensors are missing.
    """
    checkpoint = checkpoint.resolve()
    prefix = "model."  # the ComposerModel's one child
    if checkpoint.is_dir():
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        if not (checkpoint / METADATA).is_file():
            raise ValueError(f"'{checkpoint}' is no checkpoint: it has no {METADATA}")
        is_harmless(checkpoint / METADATA)
        reader = FileSystemReader(str(checkpoint))
        stored = reader.read_metadata().state_dict_metadata
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name in names
            if isinstance(entry := stored.get(f"state.model.{prefix}{name}"), TensorStorageMetadata)
        }
        state = {"state": {"model": {prefix + name: tensor for name, tensor in wanted.items()}}}
        with warnings.catch_warnings():  # that this is one process, which is what no_dist says
            warnings.simplefilter("ignore", UserWarning)
            load(state, storage_reader=reader, no_dist=True)
        tensors = wanted
    elif checkpoint.is_file():
        model = read_pickle(checkpoint)["state"]["model"]
        tensors = {name: model[prefix + name] for name in names if prefix + name in model}
    else:
        raise ValueError(f"no checkpoint at '{checkpoint}'")
    missing = sorted(names - set(tensors))
    if missing:
        raise ValueError(f"checkpoint '{checkpoint}' lacks {len(missing)} trained tensors, such as {missing[:3]}")
    return tensors


def export_checkpoint(checkpoint: Path, config: Any, folder: Path, dtype: str | None = None) -> PathMLLM:
    """Write a model folder from a checkpoint and the configuration of its run.

    Frozen modules are no part of a checkpoint; they are built again as the run built them: from their files, or random
    from its seed.

    Args:
        checkpoint: See `read_checkpoint`.
        config: As returned by `load_config`.
        folder: To write.
        dtype: `bf16`, `fp32`, or None for as trained.
    """
    settings = plain(config)
    settle_precision(settings["trainer"], "gpu" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(**settings["tokenizer"])
    model = assemble_model(**settings["model"], **held_as(settings))
    names = set(model.state_dict()) - frozen_names(model)
    if model.language_model.config.tie_word_embeddings:
        names.discard("language_model.lm_head.weight")
    weights = dict(model.state_dict()) | read_checkpoint(checkpoint, names)
    dataset = settings["train_loader"]["dataset"]
    prepared = asking_text(dataset, model.num_image_tokens()), images_of(dataset, model.vision_encoder)
    write_model(folder, model, weights, tokenizer, *prepared, dtype)
    if "projector" in settings["model"]["trainable"]:
        write_projector(folder, model, weights)
    return model
