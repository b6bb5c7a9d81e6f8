"""What the YAML's sections become: tokenizer, model, loaders, and Composer's named parts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_path.config.reading import plain

if TYPE_CHECKING:
    from composer.core import DataSpec
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from composer_path.models.path_mllm import PathMLLM


def settle_on_device(config: DictConfig) -> DictConfig:
    """The configuration with the precision that this machine's device can compute in."""
    import torch
    from omegaconf import OmegaConf

    from composer_path.run.sharding import settle_precision

    trainer = plain(config)["trainer"]
    has_gpu = torch.cuda.is_available() and trainer.get("device") != "cpu"
    settle_precision(trainer, "cuda" if has_gpu else "cpu")
    settled = config.copy()
    settled.trainer = OmegaConf.create(trainer)
    return settled


def build_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model."""
    from composer_path.records.vocabulary import load_tokenizer

    return load_tokenizer(**plain(config)["tokenizer"])


def build_model(config: DictConfig) -> PathMLLM:
    """The model, on CPU: frozen parts in the compute dtype, trained ones in fp32; empty where rank 0 sends weights."""
    from composer_path.run.sharding import compute_dtype, starts_empty
    from composer_path.weights.assembly import assemble_model

    settings = plain(config)
    parallelism = settings["trainer"].get("parallelism_config")
    return assemble_model(
        **settings["model"],
        seed=settings["seed"],
        frozen_dtype=compute_dtype(settings["trainer"].get("precision"), parallelism),
        empty=starts_empty(parallelism),
    )


def build_processor(config: DictConfig) -> dict[str, Any]:
    """How text and images are prepared: what a model folder keeps of the loader's settings."""
    from composer_path.batches.dataset import ConversationDataset

    dataset = plain(config)["train_loader"]["dataset"]
    keys = ("template", "image_position", "fit", "decoder", "max_seq_len")
    parameters = inspect.signature(ConversationDataset.__init__).parameters
    return {key: dataset.get(key, parameters[key].default) for key in keys}


def build_loader(
    section: dict[str, Any], model: PathMLLM, tokenizer: PreTrainedTokenizerBase, algorithms: Iterable[str] = ()
) -> tuple[DataSpec, int]:
    """A loader that prepares samples for this model and suits the algorithms, and how many a rank gets in a step."""
    from composer.utils import dist

    from composer_path.batches.loader import build_dataloader
    from composer_path.models.attention import check_attention_supported
    from composer_path.planning.encoded_features import check_features

    check_attention_supported(model.language_model.config, section["dataset"].get("max_seq_len", 4096))
    loader = build_dataloader(
        **section,
        tokenizer=tokenizer,
        num_image_tokens=model.num_image_tokens(),
        image_size=model.vision_encoder.image_size,
        mean=model.vision_encoder.mean,
    )
    check_features(loader.dataloader.dataset, model.vision_encoder, algorithms)  # type: ignore[union-attr]
    return loader, section["global_batch_size"] // dist.get_world_size()


def build_named(section: str, name: str, keywords: dict[str, Any] | None) -> Any:
    """A class that a section of the YAML names, with its keywords."""
    from composer_path.run.names import named_classes

    return named_classes(section)[name](**(keywords or {}))


def build_callbacks(section: dict[str, Any], **saved: Any) -> list[Any]:
    """The YAML's callbacks; `save_weights` is also told what it saves and where."""
    from composer_path.callbacks import SaveWeights

    return [
        SaveWeights(**(keywords or {}), **saved) if name == "save_weights" else build_named("callbacks", name, keywords)
        for name, keywords in section.items()
    ]


def build_loggers(settings: dict[str, Any], run_folder: Path) -> list[Any]:
    """The YAML's loggers, TensorBoard under the run's folder; a line a step where no progress bar can be drawn."""
    from composer_path.callbacks import StepLine

    loggers = []
    for name, keywords in settings.get("loggers", {}).items():
        if name == "tensorboard" and keywords["log_dir"] is None:
            keywords = keywords | {"log_dir": str(run_folder / "runs")}
        loggers.append(build_named("loggers", name, keywords))
    if not sys.stderr.isatty():
        loggers.append(StepLine())
    return loggers


def trainer_keywords(section: dict[str, Any], run_folder: Path) -> dict[str, Any]:
    """Keywords for Composer's Trainer: the YAML's, with where to save. `save_interval: null` saves nothing."""
    keywords = {"save_folder": str(run_folder / "checkpoints")} | section
    if keywords["progress_bar"] is None:
        keywords["progress_bar"] = sys.stderr.isatty()
    if keywords["save_interval"] is None:
        del keywords["save_folder"], keywords["save_interval"]
    return keywords
