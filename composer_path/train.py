"""The straight road: config, tokenizer, model, loaders, optimizer, Trainer, fit."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composer_path.config.files import check_files, samples_left_out
from composer_path.config.reading import ConfigError, load_config, plain
from composer_path.run.parts import (
    build_callbacks,
    build_loader,
    build_loggers,
    build_model,
    build_named,
    build_processor,
    build_tokenizer,
    settle_on_device,
    trainer_keywords,
)

if TYPE_CHECKING:
    from composer import Trainer
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """The command `train.py YAML [key=value ...] [--check [--files]]`; returns the exit code."""
    words = [word for word in arguments if word not in ("--check", "--files")]
    if not words:
        print("usage: composer train.py YAML [key=value ...] [--check [--files]]", file=sys.stderr)
        return 2
    try:
        config = load_config(words[0], words[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if "--check" in arguments and "--files" not in arguments:
        print(f"{words[0]}: no mistake found; files were not looked for (--files does)")
        return 0
    problems = check_files(plain(config))
    if problems:
        print(ConfigError(words[0], problems), file=sys.stderr)
        return 2
    for line in samples_left_out(plain(config)):
        print(f"{words[0]}: {line}", file=sys.stderr)
    if "--check" in arguments:
        print(f"{words[0]}: no mistake found, nor in its files")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("composer_path").setLevel(logging.INFO)
    from composer_path.weights.tensor_file import WeightsError

    try:
        train(config)
    except WeightsError as error:  # a file that doesn't fit the model it is named for
        print(error, file=sys.stderr)
        return 2
    return 0


def train(config: DictConfig) -> Trainer:
    """Train as the configuration says.

    Args:
        config: From `load_config`.

    Returns:
        The Trainer, after the last step.
    """
    import torch
    from composer import Trainer
    from composer.core import Evaluator
    from composer.utils import dist, get_device

    from composer_path.models.composer_model import ComposerPathMLLM
    from composer_path.models.execution import choose_execution
    from composer_path.run.checkpoint_safety import require_safe_checkpoints
    from composer_path.run.checkpoints import ResumableCheckpoints, TrainedOnly
    from composer_path.run.optimizer import build_optimizer, count_parameters, describe_parameters
    from composer_path.run.report import RunReport
    from composer_path.run.sharding import build_parallelism_config, mend_gloo_averaging

    given, config = config, settle_on_device(config)
    settings = plain(config)
    run_folder = Path(settings["save_root"]) / settings["trainer"]["run_name"]
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|composer)\.")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own checkpoint writer
    device = get_device(settings["trainer"].get("device"))
    if device.name == "gpu":
        torch.set_float32_matmul_precision("high")  # tf32 for what is not in bf16, as the reference
    dist.initialize_dist(device, settings["trainer"].get("dist_timeout", 300.0))
    mend_gloo_averaging()
    require_safe_checkpoints()

    tokenizer = build_tokenizer(config)
    model = choose_execution(build_model(config), **settings["execution"])
    if dist.get_global_rank() == 0:
        print(f"{settings['trainer']['run_name']} {describe_parameters(model)}", file=sys.stderr)
    trained_only = TrainedOnly(model)
    train_loader, batch_size = build_loader(
        settings["train_loader"], model, tokenizer, settings.get("algorithms") or ()
    )
    evaluators = []
    if settings.get("eval_loader"):
        held_out, eval_batch_size = build_loader(settings["eval_loader"], model, tokenizer)
        evaluators = [Evaluator(label="heldout", dataloader=held_out, device_eval_microbatch_size=eval_batch_size)]
    optimizer = build_optimizer(model, **settings["optimizer"])
    parallelism = build_parallelism_config(settings["trainer"].pop("parallelism_config", None))
    report = RunReport(run_folder, count_parameters(model))

    trainer = Trainer(
        model=ComposerPathMLLM(model),
        train_dataloader=train_loader,
        eval_dataloader=evaluators or None,
        optimizers=optimizer,
        schedulers=build_named("scheduler", settings["scheduler"].pop("name"), settings["scheduler"]),
        algorithms=[
            build_named("algorithms", name, keywords) for name, keywords in settings.get("algorithms", {}).items()
        ],
        callbacks=[
            ResumableCheckpoints(trained_only),
            *build_callbacks(
                settings.get("callbacks", {}),
                run_folder=run_folder,
                model=model,
                trained_only=trained_only,
                tokenizer=tokenizer,
                processor=build_processor(config),
            ),
            report,
        ],
        loggers=build_loggers(settings, run_folder),
        parallelism_config=parallelism,
        accumulate_train_batch_on_tokens=True,  # the loss is then the same for any split
        device_train_microbatch_size=batch_size,  # an upper bound: split_batch cuts by tokens
        seed=settings["seed"],
        **trainer_keywords(settings["trainer"], run_folder),
    )
    report.save_config(given)
    if evaluators and trainer.state.timestamp.batch == 0:
        trainer.eval()
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    else:
        log.warning("this run has ended before; its results lie in %s (trainer.max_duration says how long)", run_folder)
    trainer.close()
    return trainer
