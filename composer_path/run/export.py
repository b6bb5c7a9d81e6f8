"""What a run leaves for others: projector files, a model folder, and both again from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerBase

from composer_path.algorithms.ema import AVERAGES
from composer_path.asking.run_table import EVALUATION
from composer_path.asking.sampling import Sampling
from composer_path.batches.mixture import asking_template
from composer_path.checkpoints.gate import read_pickle
from composer_path.checkpoints.guarded import GuardedReader, load_sharded
from composer_path.checkpoints.newest import named
from composer_path.checkpoints.trained_only import frozen_names
from composer_path.config.reading import plain
from composer_path.hugging_face.carried_code import add_code, packages_needed
from composer_path.hugging_face.generation_config import GENERATION_CONFIG, generation_config
from composer_path.hugging_face.image_token import with_image_row, with_image_token
from composer_path.hugging_face.model_card import CARD, is_others_card, model_card
from composer_path.hugging_face.model_config import MODEL_TYPE
from composer_path.hugging_face.processor_folder import CHAT_TEMPLATE, IMAGE_CONFIG, PROCESSOR_CONFIG, write_processor
from composer_path.hugging_face.provenance import Provenance, hash_of
from composer_path.images.pixels import ImagePreparation
from composer_path.models.lora import is_adapter, merged, peft_config, peft_weights
from composer_path.models.pattern import MODULES, learning_modules
from composer_path.models.projector import PooledMlp
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import FILES, load_tokenizer, num_ids, save_tokenizer
from composer_path.run.place import with_local_weights
from composer_path.run.precision import held_as, settle_precision
from composer_path.run.preparation import images_of, text_of
from composer_path.run.published import publish, written_before
from composer_path.weights.assembly import assemble_model
from composer_path.weights.folder import is_weights_file, write_json
from composer_path.weights.model_folder import PathMLLM
from composer_path.weights.projector_file import REFERENCE_BIN, SAFETENSORS, save_mm_projector, save_projector
from composer_path.weights.projector_origin import ProjectorOrigin, origin_of
from composer_path.weights.tensor_file import check_tensors, write_tensors

ADAPTERS = "adapters"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_projector(
    folder: Path, model: PathMLLM, weights: Mapping[str, Tensor], origin: ProjectorOrigin, *, alone: bool = True
) -> None:
    """Write the projector for the next stage, and in the reference's file format, beside the model's configuration.

    Its weights are those of `projector.`; others may be there. `origin` is what it was trained with. Where it isn't
    `alone`, the folder has a whole model, and that one's configuration.
    """
    state = part_of(weights, "projector")
    (folder / EVALUATION).unlink(missing_ok=True)  # of an earlier model
    save_projector(folder / SAFETENSORS, model.projector, state, origin)
    if isinstance(model.projector, PooledMlp):  # the reference has no others
        save_mm_projector(folder / REFERENCE_BIN, model.projector, state)
    if alone:
        write_json(folder / "config.json", model.config())


def write_adapters(folder: Path, model: PathMLLM, weights: Mapping[str, Tensor]) -> None:
    """Write LoRA's adapters, a folder for each module that has some, as peft reads them; nothing where there are none.

    peft fits them to the module alone: `language_model` to the folder that the run's language model came from.
    """
    for name in ("language_model", "vision_encoder"):
        if config := peft_config(getattr(model, name)):
            write_adapter(folder / name, config, part_of(weights, name))


def write_adapter(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the adapters among a module's weights, as peft reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", peft_weights(weights), {})
    write_json(folder / "adapter_config.json", config)


def part_of(weights: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The weights of one of the model's modules, by its own names."""
    return {key.removeprefix(f"{module}."): value for key, value in weights.items() if key.startswith(f"{module}.")}


def write_model(
    folder: Path,
    model: PathMLLM,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    text: TextPreparation,
    images: ImagePreparation,
    dtype: str | None = None,
    provenance: Provenance | None = None,
    beside: Callable[[Path], None] | None = None,
    self_contained: bool = False,
) -> None:
    """Write everything that `composer-path ask`, transformers and those who build on it need.

    An earlier model in the folder stays until the new one is complete, and takes its evaluation with it. The model and
    the tokenizer stay as they are: what is written has a token for an image, see `hugging_face/image_token.py`.
    `beside` writes more files into the same folder, which come and go with the model. Where it is `self_contained`, the
    folder carries the code for those who don't have this package.

    Raises:
        ValueError: An unknown `dtype`, weights that aren't finite, files in the folder that no export wrote, or parts
            of one's own in a model that is to be self-contained.
    """
    weights = dict(weights)
    cast(weights, dtype)
    tokenizer, token = with_image_token(tokenizer)
    weights = with_image_row(model.language_model, merged(model, weights), token)
    origin = provenance or Provenance()
    keeps_card = is_others_card(folder / CARD)

    def write(new: Path) -> None:
        save_tokenizer(tokenizer, new)
        encoder = model.vision_encoder
        write_processor(new, tokenizer, text, images, token.text, (encoder.mean, encoder.std))
        write_json(new / GENERATION_CONFIG, generation_config(tokenizer, text, token.id, Sampling.max_new_tokens))
        if not keeps_card:
            needs = packages_needed(encoder.config["name"], new) if self_contained else ()
            card = model_card(model, weights, text, images, token, origin, needs)
            (new / CARD).write_text(card, encoding="utf-8")
        if beside is not None:
            beside(new)
        model.save_pretrained(
            new,
            state_dict=weights,
            image_token_id=token.id,
            max_seq_len=text.max_seq_len,
            metadata=origin.metadata(),
        )
        if self_contained:
            add_code(new)

    publish(folder, MODEL_TYPE, write, unlisted=is_model_file, keep=[CARD] if keeps_card else [])


def is_model_file(name: str) -> bool:
    """Whether a file of a model folder belongs to its model, by its name."""
    ours = {"config.json", GENERATION_CONFIG, PROCESSOR_CONFIG, CARD, SAFETENSORS, REFERENCE_BIN}
    return name in ours | {IMAGE_CONFIG, CHAT_TEMPLATE, *FILES} or is_weights_file(name)


def read_checkpoint(checkpoint: Path, names: set[str]) -> dict[str, Tensor]:
    """The named tensors of a Composer checkpoint, a sharded folder or a single file, on one CPU process.

    Raises:
        ValueError: Not a checkpoint, or tensors are missing.
    """
    checkpoint = named(checkpoint).path
    prefix = "model."  # the ComposerModel's one child
    wanted: dict[str, Tensor] = {}
    if checkpoint.is_dir():
        reader = GuardedReader(str(checkpoint))
        stored = reader.read_metadata().state_dict_metadata
        tensors = {}
        for name in names:  # its average, where the run kept one
            for key in (AVERAGES + name, f"state.model.{prefix}{name}"):
                if prefix + name not in tensors and isinstance(entry := stored.get(key), TensorStorageMetadata):
                    tensors[prefix + name] = torch.empty(entry.size, dtype=entry.properties.dtype)
                    wanted[key] = tensors[prefix + name]
        load_sharded(wanted, reader, alone=True)
    else:
        content = read_pickle(checkpoint)
        state = content.get("state") if isinstance(content, dict) else None
        found = state.get("model") if isinstance(state, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"'{checkpoint}' is no checkpoint of a run: it has no state of a model")
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if missing := sorted(name for name in names if prefix + name not in tensors):
        raise ValueError(f"checkpoint '{checkpoint}' lacks {len(missing)} trained tensors, such as {missing[:3]}")
    return {name: tensors[prefix + name] for name in names}


@dataclass(frozen=True)
class Trained:
    """A trained model, and all that is known of how it is asked.

    Attributes:
        model: The architecture; its own weights needn't be the trained ones.
        weights: The trained ones, by the names of `model`; those of adapters apart.
        tokenizer: Of its language model.
        text: How text was prepared.
        images: How images were.
        trained_modules: Which modules learned; None where that isn't known.
        provenance: Of which run and step it is; None where that isn't known.
    """

    model: PathMLLM
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    text: TextPreparation
    images: ImagePreparation
    trained_modules: list[str] | None = None
    provenance: Provenance | None = None


def read_trained(checkpoint: Path, config: Any) -> Trained:
    """The model of a checkpoint and the configuration of its run.

    Frozen modules are no part of a checkpoint; they are built again as the run built them: from their files, or random
    from its seed. The template is the one that was trained; of a mixture with several, the one named for asking, which
    is `train_loader.dataset.template`.
    """
    settings = plain(config)
    settle_precision(settings["trainer"], "gpu" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(**settings["tokenizer"])
    held = held_as(settings) | {"vocabulary": num_ids(tokenizer)}
    section = with_local_weights(settings)["model"]
    whole = _all_trained(assemble_model(**section, **held | {"empty": True}))
    # What a checkpoint has all of needn't be there before: a model is held once.
    model = assemble_model(**section, **held | {"empty": whole})
    names = set(model.state_dict()) - frozen_names(model)
    if tied := model.tied_names():
        names.discard(tied[0])
    weights = dict(model.state_dict())
    trained = read_checkpoint(checkpoint, names)
    check_tensors(str(checkpoint), {name: weights[name] for name in names}, trained)
    weights |= trained
    if tied:
        weights[tied[0]] = weights[tied[1]]
    dataset = settings["train_loader"]["dataset"]
    text = text_of(dataset, asking_template(dataset["template"], dataset["streams"]), model.num_image_tokens())
    learning = learning_modules(settings["model"])
    provenance = provenance_of(checkpoint, settings["trainer"]["run_name"], learning)
    return Trained(model, weights, tokenizer, text, images_of(dataset, model.vision_encoder), learning, provenance)


def provenance_of(checkpoint: Path, run: str, trained: Sequence[str]) -> Provenance:
    """What a checkpoint says of where it comes from."""
    found = named(checkpoint)
    hashed = None if found.manifest is None else hash_of(found.manifest.fingerprint)
    return Provenance(run, found.step or None, tuple(trained), hashed)


def _all_trained(model: PathMLLM) -> set[str]:
    """The modules of which a checkpoint holds every tensor."""
    frozen = {name.partition(".")[0] for name in frozen_names(model)}
    buffers = {name.partition(".")[0] for name in model.state_dict().keys() - dict(model.named_parameters()).keys()}
    tied = {"language_model"} if model.tied_names() else set()  # whose head is in the state only
    whole = {*map(str, MODULES)} - frozen - (buffers - tied)
    # A projector's file is checked against the encoder's weights, which must then be there; marks around images that no
    # run trained are made of the words.
    marked = {"language_model"} if model.projector.marks is not None else set()
    return whole if "projector" in whole else whole - {"vision_encoder"} - marked


def export_checkpoint(
    checkpoint: Path, config: Any, folder: Path, dtype: str | None = None, self_contained: bool = False
) -> PathMLLM:
    """Write a model folder from a checkpoint and the configuration of its run; returns the model that it is of, empty.

    Weights are written as `bf16`, `fp32`, or (None) as trained. `self_contained` is as `write_model` takes it.
    """
    written_before(folder, MODEL_TYPE)  # refused before weights are read
    found = read_trained(checkpoint, config)
    model, weights = found.model, merged(found.model, found.weights)
    adapters = {name: value for name, value in found.weights.items() if is_adapter(name)}
    origin = origin_of_trained(found, weights) if "projector" in (found.trained_modules or ()) else None
    projector = part_of(weights, "projector")
    found.weights.clear()  # so that a weight is held once while the next ones are cast
    cast(weights, dtype)

    def write_parts(new: Path) -> None:
        write_adapters(new / ADAPTERS, model, adapters)
        if origin is not None:
            named = {f"projector.{name}": value for name, value in projector.items()}
            write_projector(new, model, named, origin, alone=False)

    prepared = found.tokenizer, found.text, found.images
    write_model(
        folder,
        model,
        weights,
        *prepared,
        provenance=found.provenance,
        beside=write_parts,
        self_contained=self_contained,
    )
    return model


def cast(weights: dict[str, Tensor], dtype: str | None) -> None:
    """Cast weights in their dict, one after the other, to one dtype; whole numbers stay.

    None takes the widest that is there: transformers loads a folder in one dtype, and nothing is lost so.

    Raises:
        ValueError: An unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype of written weights: unknown '{dtype}'; choose one of {', '.join(DTYPES)}")
    there = {value.dtype for value in weights.values() if value.is_floating_point()}
    if not there:
        return
    wanted = functools.reduce(torch.promote_types, there) if dtype is None else DTYPES[dtype]
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype != wanted:
            weights[name] = value.to(wanted)


def origin_of_trained(found: Trained, weights: Mapping[str, Tensor]) -> ProjectorOrigin:
    """What a projector was trained with, where the encoder's merged weights are among these."""
    vision = part_of(weights, "vision_encoder")
    return origin_of(found.model.projector, found.model.vision_encoder, found.text.template.to_json(), weights=vision)
