"""What our YAML's sections are: which constructors get them, and what their signatures don't say."""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args

from composer_path.config import rules
from composer_path.config.schema import Choice, Key, Node, Section, key_of, section_of
from composer_path.run.names import named_classes

AT_LEAST_0, AT_LEAST_1, ABOVE_0 = {"at_least": 0}, {"at_least": 1}, {"check": rules.check_above_zero}


@cache
def config_schema() -> Section:
    """The whole YAML. Imports the libraries whose signatures it reads (some seconds)."""
    return Section(
        {
            "version": Key(Literal[1], required=True),
            "seed": Key(int, required=True, at_least=0),
            "save_root": Key(str, required=True),
            "variables": Section({}, open=True, left_out="empty"),
            "tokenizer": _tokenizer(),
            "model": _model(),
            "execution": _execution(),
            "train_loader": _loader(required=True),
            "eval_loader": _loader(required=False),
            "optimizer": _optimizer(),
            "scheduler": _scheduler(),
            "algorithms": _named_sections("algorithms"),
            "callbacks": _named_sections("callbacks"),
            "loggers": _named_sections("loggers"),
            "trainer": _trainer(),
        }
    )


def _scheduler() -> Choice:
    return Choice("name", {name: section_of(cls) for name, cls in named_classes("scheduler").items()}, required=True)


def _tokenizer() -> Section:
    from composer_path.records.vocabulary import load_tokenizer

    return section_of(load_tokenizer, required=True)


def _model() -> Section:
    from composer_path.models.attentional_pooler import PoolerSettings
    from composer_path.models.projector import MlpSettings, untrained_projector
    from composer_path.models.vision_encoder import untrained_vision_encoder
    from composer_path.weights.assembly import assemble_model
    from composer_path.weights.language_folder import build_language_model
    from composer_path.weights.projector_file import build_projector
    from composer_path.weights.vision_file import build_vision_encoder

    from_parts = dict.fromkeys(("in_dim", "out_dim"), "leave it out; it is read from the built parts")
    decided = dict.fromkeys(("dtype", "empty"), "leave it out; it follows from trainer.precision and the sharding")
    pooler = section_of(PoolerSettings, changes=dict.fromkeys(("dim", "num_queries", "num_heads"), AT_LEAST_1))
    mlp = section_of(MlpSettings, changes={"depth": {"at_least": 0}})
    sections: dict[str, Any] = {
        "vision_encoder": section_of(
            build_vision_encoder,
            untrained_vision_encoder,
            required=True,
            changes={"name": {"check": rules.check_vision_name}, "image_size": AT_LEAST_1},
        ),
        "projector": section_of(
            build_projector,
            untrained_projector,
            required=True,
            refused=from_parts,
            changes={"type": {"check": rules.check_projector_type}, "pooler": pooler, "mlp": mlp},
        ),
        "language_model": section_of(
            build_language_model,
            required=True,
            refused={**decided, "attention": "use model.attention"},
            changes={"config": {"check": rules.check_language_model}},
        ),
    }
    return section_of(assemble_model, leave_out=("seed", "frozen_dtype", "empty"), changes=sections, required=True)


def _execution() -> Section:
    from composer_path.models.execution import choose_execution

    numbers = dict.fromkeys(("vision_chunk", "loss_chunk", "row_multiple"), AT_LEAST_1)
    return section_of(choose_execution, leave_out=("model",), changes=numbers, left_out="empty")


def _loader(required: bool) -> Section:
    from streaming import StreamingDataset
    from streaming.base.batching import batching_methods
    from streaming.base.hashing import get_hashes
    from streaming.base.partition import algos as partition_algos
    from streaming.base.shuffle import algos as shuffle_algos

    from composer_path.batches.dataset import ConversationDataset
    from composer_path.batches.loader import build_dataloader
    from composer_path.batches.mixture import build_stream, check_streams
    from composer_path.stream.guarded import GuardedStreamingDataset

    built = ("tokenizer", "num_image_tokens", "image_size", "pad_color", "mean", "std")
    refused = dict.fromkeys(built, "leave it out; it is read from the model") | {"batch_size": "use global_batch_size"}
    places: dict[str, Any] = {key: {"check": rules.check_place} for key in ("local", "remote")}
    template = {"annotation": str | dict | None, "check": rules.check_template}
    inherited = {**template, "default": "${...template}"}  # the dataset's, where a stream names none
    stream = section_of(build_stream, leave_out=("name", "text"), changes={**places, "template": inherited})
    counts = ("max_seq_len", "max_pixels", "num_canonical_nodes", "predownload", "sampling_granularity")
    dataset = section_of(
        ConversationDataset,
        GuardedStreamingDataset,
        StreamingDataset,
        refused={
            **refused,
            "download_retry": "use fault_timeout, the seconds in which a file must have arrived",
            **dict.fromkeys(("stream_name", "stream_config"), "use streams"),
        },
        required=True,
        changes={
            **places,
            "template": template,
            **dict.fromkeys((*counts, "shuffle_block_size", "replication"), AT_LEAST_1),
            **dict.fromkeys(("fault_timeout", "download_timeout"), ABOVE_0),
            "streams": Section({}, members=stream, check=check_streams),
            # Streaming's own words are listed where it looks them up; of `sampling_method` it has no table.
            "shuffle_algo": {"annotation": Literal[tuple(shuffle_algos)]},
            "partition_algo": {"annotation": Literal[tuple(partition_algos)]},
            "batching_method": {"annotation": Literal[tuple(batching_methods)]},
            "sampling_method": {"annotation": Literal["balanced", "fixed"]},
            "validate_hash": {"annotation": Literal[tuple(sorted(get_hashes()))] | None},
            "cache_limit": {"check": rules.check_bytes},
            "epoch_size": {"check": rules.check_epoch_size},
            "shuffle_seed": AT_LEAST_0,
        },
    )
    return section_of(
        build_dataloader,
        required=required,
        refused=refused,
        changes={
            "dataset": dataset,
            **dict.fromkeys(("global_batch_size", "max_tokens_per_microbatch", "prefetch_factor"), AT_LEAST_1),
            **dict.fromkeys(("num_workers", "timeout"), AT_LEAST_0),
        },
    )


def _optimizer() -> Choice:
    from composer_path.run.optimizer import OptimizerName, build_optimizer, optimizer_class

    changes: dict[str, Any] = {
        **dict.fromkeys(("lr", "weight_decay", "eps"), AT_LEAST_0),
        "betas": {"check": rules.check_beta},
    }
    sections: dict[Any, Section] = {}
    for name in get_args(OptimizerName):
        try:
            functions: list[Any] = [build_optimizer, optimizer_class(name)]
        except ValueError:  # its package isn't installed: said when it is built
            functions = [build_optimizer]
        sections[name] = section_of(*functions, leave_out=("model", "name", "params"), changes=changes)
    return Choice("name", sections, required=True)


def _named_sections(name: str) -> Section:
    """`snake_name: {keywords}`; of an `is_run_object` the keyword-only arguments come from the run."""
    refused = {
        "checkpoint_saver": "use trainer.save_interval and its neighbours",
        "console": "use trainer.log_to_console",
        "progress_bar": "use trainer.progress_bar",
    }
    clipping = {"clipping_type": {"annotation": Literal["norm", "value", "adaptive"]}, "clipping_threshold": ABOVE_0}
    changes: dict[str, Any] = {"gradient_clipping": clipping}
    sections: dict[str, Node] = {}
    for key, cls in named_classes(name).items():
        parameters = inspect.signature(cls).parameters.values() if getattr(cls, "is_run_object", False) else ()
        supplied = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if key not in refused:
            sections[key] = section_of(cls, leave_out=supplied, changes=changes.get(key), left_out="absent")
    refused = {key: hint for key, hint in refused.items() if key in named_classes(name)}
    return Section(sections, refused=refused, left_out="empty")


def _trainer() -> Section:
    from composer import Trainer
    from composer.core import Precision

    elsewhere = {
        **{key: f"use the section {key}" for key in ("model", "algorithms", "callbacks", "loggers")},
        **{f"{key}_dataloader": f"use the section {key}_loader" for key in ("train", "eval")},
        **{f"{key}s": f"use the section {key}" for key in ("optimizer", "scheduler")},
        "train_dataloader_label": "leave it out; it is always 'train'",
        "seed": "use the top-level seed",
        "save_folder": "use save_root; checkpoints lie in save_root/run_name/checkpoints",
        "device_train_microbatch_size": "use train_loader.max_tokens_per_microbatch",
        "accumulate_train_batch_on_tokens": "leave it out; use train_loader.loss_average",
        "step_schedulers_every_batch": "leave it out; the schedulers step every batch",
    }
    objects = ("algorithm_passes", "console_stream", "load_object_store", "profiler")
    return section_of(
        Trainer,
        required=True,
        refused=elsewhere | dict.fromkeys(objects, "leave it out; it takes an object, which a YAML can't hold"),
        changes={
            "run_name": {"annotation": str, "required": True, "check": rules.check_run_name},
            "max_duration": {"required": True, "check": rules.check_max_duration},
            "eval_interval": {"check": rules.check_eval_interval},
            "console_log_interval": {"check": rules.check_console_interval},
            "save_interval": {"annotation": str | int | None},  # null saves nothing
            "progress_bar": {"annotation": bool | None, "default": None},  # null: where a terminal can draw it
            # Composer's own default on a GPU is fp16.
            "precision": {"annotation": Literal[tuple(each.value for each in Precision)], "required": True},
            "device": {"annotation": Literal["cpu", "gpu"] | None},
            **dict.fromkeys(("dist_timeout", "scale_schedule_ratio"), ABOVE_0),
            "parallelism_config": Section({"fsdp": _fsdp()}),
        },
    )


def _fsdp() -> Choice:
    """Composer sets any word as an attribute of its FSDP1 configuration, so its fields are the list of keys."""
    from composer.utils.parallelism import FSDP2Config, FSDPConfig

    from composer_path.run.sharding import FSDP1_DEFAULTS

    mixed = Literal["param_dtype", "reduce_dtype", "buffer_dtype"]
    words: dict[str, Any] = {
        "mixed_precision": Literal["DEFAULT", "PURE", "FULL"] | dict[mixed, Literal["fp32", "bf16"]],
        "state_dict_type": Literal["full", "sharded"],
        "sharding_strategy": Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"],
        "backward_prefetch": Literal["BACKWARD_PRE", "BACKWARD_POST", "NONE"],
    }
    objects = ("device_mesh", "ignored_modules", "load_planner", "save_planner", "process_group")
    ours = dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_reentrant", "activation_cpu_offload"),
        "use execution.activation_checkpointing, which works with and without sharding",
    )
    sections = {}
    for version, cls, defaults in ((1, FSDPConfig, FSDP1_DEFAULTS), (2, FSDP2Config, {})):
        keys: dict[str, Node] = {
            item.name: key_of(item.name, words.get(item.name, item.type), defaults.get(item.name, item.default))
            for item in fields(cls)
            if not item.name.startswith("_") and item.name not in objects and item.name not in ours
        }
        sections[version] = Section(keys, refused=ours)
    return Choice("version", sections, default=2)
