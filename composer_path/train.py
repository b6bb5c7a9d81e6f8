"""The straight road: config, tokenizer, model, loaders, optimizer, Trainer, fit."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_path.commands.verb import run_verb

if TYPE_CHECKING:
    from composer import Algorithm, Callback, Trainer
    from composer.core import DataSpec
    from composer.loggers import LoggerDestination
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from composer_path.guards.guards import Guards
    from composer_path.models.path_mllm import PathMLLM

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `composer-path train`; returns the exit code."""
    return run_verb("train", arguments)


def train(
    config: DictConfig,
    *,
    callbacks: Sequence[Callback] = (),
    algorithms: Sequence[Algorithm] = (),
    loggers: Sequence[LoggerDestination] = (),
) -> Trainer:
    """Train as a configuration says; returns the Trainer, after the last step.

    Args:
        config: From `load_config`.
        callbacks: Objects beside those that the configuration names.
        algorithms: Likewise.
        loggers: Likewise.

    Raises:
        ValueError: Another process trains in the run's folder.
        RunStopped: It was asked to stop, or met NaN (`NotFinite`); see docs/stopping.md.
    """
    from composer_path.config.reading import plain
    from composer_path.guards.guards import Guards
    from composer_path.run.place import alone_in, folder_of

    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name; torch reads either when it first takes GPU memory
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows differ in size: no holes
    settings = plain(config)
    run_folder = folder_of(settings["save_root"], settings["trainer"]["run_name"])
    with alone_in(run_folder), Guards(**settings["guards"], run_folder=run_folder) as guards:
        return guarded_train(config, settings, run_folder, guards, callbacks, algorithms, loggers)


def guarded_train(
    config: DictConfig,
    settings: dict[str, Any],
    run_folder: Path,
    guards: Guards,
    callbacks: Sequence[Callback],
    algorithms: Sequence[Algorithm],
    loggers: Sequence[LoggerDestination],
) -> Trainer:
    """Train, with guards that are on."""
    import torch
    from composer.core import Evaluator
    from composer.utils import dist, get_device

    from composer_path.batches.measure import tokenizer_hash
    from composer_path.checkpoints.gate import require_safe_checkpoints
    from composer_path.checkpoints.trained_only import TrainedOnly
    from composer_path.guards.ending import RunStopped
    from composer_path.models.composer_model import ComposerPathMLLM
    from composer_path.models.execution import choose_execution
    from composer_path.records.vocabulary import check_vocabulary, load_tokenizer, num_ids
    from composer_path.run.evaluations import eval_sections
    from composer_path.run.optimizer import build_optimizer, count_parameters, describe_groups, describe_parameters
    from composer_path.run.parts import build_metrics, build_parts, trainer_keywords
    from composer_path.run.place import with_local_weights
    from composer_path.run.precision import require_device, settle_precision
    from composer_path.run.preparation import note_levels
    from composer_path.run.report import RunReport, nothing_left, require_steps
    from composer_path.run.schedule import build_schedule
    from composer_path.run.sharding import build_parallelism_config, mend_gloo_averaging
    from composer_path.run.start import choose_start
    from composer_path.run.told_settings import tell_settings
    from composer_path.run.trainer import StepTrainer

    trainer_section = settings["trainer"]
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|composer)\.")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own checkpoint writer
    require_device(trainer_section["device"])
    device = get_device(trainer_section["device"])
    if device.name == "gpu":
        torch.set_float32_matmul_precision("high")  # tf32 for what is not in bf16, as the reference
    settle_precision(trainer_section, device.name)
    dist.initialize_dist(device, trainer_section["dist_timeout"])
    guards.board.join()
    mend_gloo_averaging()
    parallelism = build_parallelism_config(trainer_section["parallelism_config"])
    require_safe_checkpoints()

    tokenizer = load_tokenizer(**settings["tokenizer"])
    model = choose_execution(build_model(with_local_weights(settings), num_ids(tokenizer)), **settings["execution"])
    check_vocabulary(tokenizer, model.num_embeddings())
    optimizer = build_optimizer(model, **settings["optimizer"])
    if dist.get_global_rank() == 0:
        print(f"{trainer_section['run_name']} {describe_parameters(model)}", file=sys.stderr)
        if settings["optimizer"]["groups"] or settings["optimizer"]["layer_wise_lr_decay"]:
            print(describe_groups(optimizer), file=sys.stderr)
    trained_only = TrainedOnly(model)

    train_loader: Any = build_loader(settings["train_loader"], model, tokenizer, settings["algorithms"])
    evaluators = []
    for label, section in eval_sections(settings).items():
        held_out: Any = build_loader(section, model, tokenizer)
        most = held_out.dataloader.batch_size
        evaluators.append(Evaluator(label=label, dataloader=held_out, device_eval_microbatch_size=most))
    report = RunReport(run_folder, count_parameters(model))
    dataset = train_loader.dataloader.dataset
    prepared = {"tokenizer": tokenizer, "text": dataset.text, "images": dataset.images}
    config = note_levels(settings["train_loader"]["dataset"], config, dataset.images)
    start = choose_start(settings, trained_only, tokenizer_hash(tokenizer), dataset.data_hash)
    of_the_run = {"run_folder": run_folder, "model": model, "trained_only": trained_only, **prepared}
    trainer = StepTrainer(
        model=ComposerPathMLLM(model, *(build_metrics(settings[key]) for key in ("eval_metrics", "train_metrics"))),
        train_dataloader=train_loader,
        eval_dataloader=evaluators or None,
        optimizers=optimizer,
        schedulers=build_schedule(**settings["scheduler"]),
        algorithms=[*build_parts("algorithms", settings["algorithms"], of_the_run), *algorithms],
        callbacks=[
            guards,
            *build_parts("callbacks", settings["callbacks"], of_the_run),
            *callbacks,
            report,
            *start.callbacks,
        ],
        loggers=[*build_parts("loggers", settings["loggers"], of_the_run), *loggers],
        parallelism_config=parallelism,
        accumulate_train_batch_on_tokens=True,  # the loss is then the same for any split
        device_train_microbatch_size=train_loader.dataloader.batch_size,  # an upper bound: split_batch cuts by tokens
        seed=settings["seed"],
        **trainer_keywords(trainer_section),
    )
    try:
        if trainer.state.timestamp < trainer.state.max_duration:
            report.save_config(config, start.history)
            tell_settings(trainer.logger, config)
            if evaluators and trainer.state.timestamp.batch == 0:
                trainer.eval()
                require_steps(trainer.state)
            trainer.fit()
        else:
            log.warning("%s", nothing_left(settings, run_folder))
    except RunStopped:  # on all ranks at once
        trainer.close()
        raise
    trainer.close()
    return trainer


def build_model(settings: Mapping[str, Any], vocabulary: int | None = None) -> PathMLLM:
    """The model, on CPU: frozen parts in the compute dtype, trained ones in fp32; empty where rank 0 sends weights.

    `vocabulary` is how many ids the tokenizer has, see `assemble_model`.
    """
    from composer_path.run.precision import held_as
    from composer_path.weights.assembly import assemble_model

    return assemble_model(**settings["model"], **held_as(settings), vocabulary=vocabulary)


def build_loader(
    section: Mapping[str, Any], model: PathMLLM, tokenizer: PreTrainedTokenizerBase, algorithms: Iterable[str] = ()
) -> DataSpec:
    """A loader that prepares samples for this model and suits the algorithms."""
    from composer_path.batches.loader import build_dataloader
    from composer_path.models.language_types import check_length_supported, warn_of_length
    from composer_path.planning.encoded_features import check_features

    encoder = model.vision_encoder
    longest = section["dataset"]["max_seq_len"]
    check_length_supported(model.language_model.config, model.longest_in_row(longest))
    warn_of_length(model.language_model.config, longest)
    asked = {"image_size": encoder.image_size, "mean": encoder.mean, "num_image_tokens": model.num_image_tokens()}
    loader: Any = build_dataloader(**{**section, **asked, "tokenizer": tokenizer})
    check_features(loader.dataloader.dataset, encoder, algorithms)
    return loader


if __name__ == "__main__":
    sys.exit(main())
