"""What our YAML's sections are: which constructors get them, and what their signatures don't say."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, Literal, get_type_hints

from composer import Trainer
from composer.core import Precision
from composer.utils.parallelism import FSDPConfig
from streaming import StreamingDataset
from streaming.base.hashing import get_hashes
from streaming.base.shuffle import algos as shuffle_algos

from composer_path.batches.dataset import ConversationDataset
from composer_path.batches.loader import build_dataloader
from composer_path.batches.mixture import build_stream
from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.config import rules
from composer_path.config.own_section import own_section
from composer_path.config.schema import ABSENT, REQUIRED, Choice, Key, Node, Section, key_of, section_of
from composer_path.guards.guards import Guards
from composer_path.guards.requests import seconds_of
from composer_path.models.attentional_pooler import PoolerSettings
from composer_path.models.execution import choose_execution
from composer_path.models.lora import add_lora
from composer_path.models.pattern import check_pattern
from composer_path.models.projector import MlpSettings, untrained_projector
from composer_path.models.vision_encoder import check_vision_keywords, check_vision_name, untrained_vision_encoder
from composer_path.own_parts.registry import Kind, own_classes
from composer_path.own_parts.registry import version as parts_version
from composer_path.records.prompts import get_template
from composer_path.records.vocabulary import RESERVED as TOKENIZER_RESERVED
from composer_path.records.vocabulary import TokenizerKeywords, load_tokenizer
from composer_path.run.foreign_names import foreign_names
from composer_path.run.names import library_classes, named_classes
from composer_path.run.optimizer import REFUSED as REFUSED_OPTIMIZERS
from composer_path.run.optimizer import build_optimizer, known_optimizers, optimizer_class
from composer_path.run.schedule import build_schedule
from composer_path.run.sharding import FSDP1_DEFAULTS, HybridFSDP2Config
from composer_path.run.verdicts import FOUNDRY, refused
from composer_path.storage.places import check_readable
from composer_path.stream.guarded import GuardedStreamingDataset
from composer_path.stream.order import REFUSED, check_setting
from composer_path.weights.assembly import assemble_model
from composer_path.weights.language_folder import build_language_model
from composer_path.weights.projector_file import build_projector
from composer_path.weights.vision_file import build_vision_encoder

TOKEN_LOSS = "leave it out; an evaluation always has it, and a step its loss"
SEED = "${seed}"  # of the whole run
SEEDS: dict[str, Any] = {
    "at_least": 0,
    "at_most": 4_000_000_000,
}  # NumPy's generators take 32 bits, and some are counted up from it
AT_LEAST_0, AT_LEAST_1, ABOVE_0 = {"at_least": 0}, {"at_least": 1}, {"check": rules.check_above_zero}
# Of torch's optimizers: what would climb the loss, or needs a caller of another kind.
NO_SWITCHES = dict.fromkeys(("maximize", "capturable", "differentiable"), "leave it out; training minimises a loss")
OPTIMIZER_TYPES: dict[str, Any] = {}
SECONDS = {"check": rules.check_seconds}


def _from_1(most: int) -> dict[str, Any]:
    """A number of things that a slip of the keyboard shouldn't build for hours."""
    return {"at_least": 1, "at_most": most}


def config_schema() -> Section:
    """The whole YAML, with the parts of one's own that are known now."""
    return _config_schema(parts_version())


@lru_cache(maxsize=2)
def _config_schema(version: int) -> Section:
    of_schedules: dict[str, Any] = dict.fromkeys(("alpha", "alpha_i", "alpha_f", "gamma", "power"), AT_LEAST_0)
    of_schedules["t_warmup"] = {"check": rules.check_warmup}
    timing = section_of(build_schedule, leave_out=("name",)).keys
    schedules = {
        name: section_of(build_schedule, cls, leave_out=("name",), changes=of_schedules)
        for name, cls in library_classes("scheduler").items()
    }
    for name, cls in own_classes("schedulers").items():
        schedules[name] = Section({**own_section(cls, (*timing,)).keys, **timing}, None)
    metrics = {name: own_section(cls) for name, cls in own_classes("metrics").items()}
    no_code = dict.fromkeys(TOKENIZER_RESERVED, "leave it out; no code of a tokenizer is run, and nothing fetched")
    said_of_tokenizers = {name: Key(kind, ABSENT) for name, kind in get_type_hints(TokenizerKeywords).items()}
    chunks = dict.fromkeys(("vision_chunk", "loss_chunk", "row_multiple"), AT_LEAST_1)
    return Section(
        {
            "version": Key(Literal[1]),
            "imports": Key(list[str], []),
            "seed": Key(int, **SEEDS),
            "save_root": Key(str, check=rules.check_save_root),
            "variables": Section({}, {}, open=True),
            "tokenizer": Section({**section_of(load_tokenizer).keys, **said_of_tokenizers}, REQUIRED, no_code),
            "model": _model(),
            "execution": section_of(choose_execution, leave_out=("model",), changes=chunks, default={}),
            "train_loader": _loader(REQUIRED),
            "eval_loader": _loader(None),
            "eval_loaders": Section({}, {}, members=_loader(None)),
            **{name: Section(metrics, {}, {"token_loss": TOKEN_LOSS}) for name in ("eval_metrics", "train_metrics")},
            "optimizer": _optimizer(),
            "scheduler": Choice("name", schedules, REQUIRED),
            **{name: _named_sections(name) for name in ("algorithms", "callbacks", "loggers")},
            "guards": _guards(),
            "trainer": _trainer(),
        }
    )


def _model() -> Section:
    sizes = dict.fromkeys(("in_dim", "out_dim", "vision_encoder"), "leave it out; it is read from the built parts")
    decided = dict.fromkeys(("dtype", "empty"), "leave it out; it follows from trainer.precision and the sharding")
    decided |= {"attention": "use model.attention", "vocabulary": "leave it out; it is the tokenizer's"}
    decided |= {
        "bits": "use execution.frozen_weights: int8 or nf4",
        "load_in_8bit": "use execution.frozen_weights: int8",
    }
    decided |= {"load_in_4bit": "use execution.frozen_weights: nf4"}
    pooler = section_of(PoolerSettings, changes=dict.fromkeys(("dim", "num_queries", "num_heads"), _from_1(10**5)))
    mlp = section_of(MlpSettings, changes={"depth": {"at_least": 0, "at_most": 100}})
    vision: dict[str, Any] = {"name": {"check": check_vision_name}, "image_size": _from_1(10**4)}
    vision |= {"mean": {"check": rules.check_mean}, "std": {"check": rules.check_std}}
    vision["kwargs"] = {"check": check_vision_keywords}
    projector: dict[str, Any] = {"type": {"check": rules.check_projector_type}, "pooler": pooler, "mlp": mlp}
    config: dict[str, Any] = {"config": {"check": rules.check_language_model}}
    parts: dict[str, Any] = {
        "vision_encoder": _with_own(
            "name",
            "vision_encoders",
            section_of(build_vision_encoder, untrained_vision_encoder, changes=vision, default=REQUIRED),
            ("image_size",),
        ),
        "projector": _with_own(
            "type",
            "projectors",
            section_of(
                build_projector,
                untrained_projector,
                refused=sizes | {"kwargs": "they are of a projector of one's own; name its class as type"},
                changes=projector,
                default=REQUIRED,
            ),
            ("in_dim", "out_dim"),
        ),
        "language_model": section_of(build_language_model, refused=decided, changes=config, default=REQUIRED),
    }
    parts["trainable"] = {"check": check_pattern}
    numbers: dict[str, Any] = {"r": _from_1(10**4), "lora_alpha": ABOVE_0, "lora_dropout": {"check": rules.check_beta}}
    adapters = section_of(add_lora, leave_out=("module", "blocks", "where"), changes=numbers)
    parts["lora"] = Section({"vision_encoder": adapters, "language_model": adapters})
    return section_of(
        assemble_model, leave_out=("seed", "frozen_dtype", "vocabulary", "empty"), changes=parts, default=REQUIRED
    )


def _with_own(selector: str, kind: Kind, usual: Section, supplied: tuple[str, ...]) -> Choice | Section:
    """A part of the model that may be of a class of one's own, whose keywords are then `kwargs`."""
    sections = {}
    for name, cls in own_classes(kind).items():
        common = ("image_size", "tokens", "mean", "std") if kind == "vision_encoders" else ("image_marks",)
        keys: dict[str, Node] = {key: usual.keys[key] for key in ("weights", *common)}
        keys["kwargs"] = own_section(cls, supplied, default={})
        sections[name] = Section(keys, usual.default)
    return Choice(selector, sections, usual.default, otherwise=usual) if sections else usual


def _loader(default: Any) -> Section:
    built = ("tokenizer", "num_image_tokens", "image_size", "pad_color", "mean", "std")
    refused = dict.fromkeys(built, "leave it out; it is read from the model") | {"batch_size": "use global_batch_size"}
    of_streaming = dict.fromkeys(("stream_name", "stream_config"), "use streams")
    of_streaming["drop_last"] = "it stands in the loader's section"
    of_streaming["download_retry"] = "use fault_timeout, the seconds in which a file must have arrived"
    checks: dict[str, Any] = {
        "local": {"check": check_readable},
        "remote": {"check": check_readable},
        "template": {"annotation": str | dict[str, Any] | None, "check": get_template},
    }
    stream = section_of(build_stream, leave_out=("name", "text"), changes=checks)
    counts = ("max_seq_len", "max_pixels", "num_canonical_nodes", "predownload", "sampling_granularity")
    changes = {
        **checks,
        **dict.fromkeys(counts, AT_LEAST_1),
        **{name: {"check": partial(check_setting, name)} for name in ("shuffle_block_size", *REFUSED)},
        **dict.fromkeys(("fault_timeout", "download_timeout"), SECONDS),
        # Streaming's own words are listed where it looks them up; of `sampling_method` it has no table.
        "shuffle_algo": {"annotation": Literal[tuple(shuffle_algos)]},
        "sampling_method": {"annotation": Literal["balanced", "fixed"]},
        "validate_hash": {"annotation": Literal[tuple(sorted(get_hashes()))] | None},
        "streams": Section({}, members=stream),
        "cache_limit": {"check": rules.check_bytes},
        "epoch_size": {"check": rules.check_epoch_size},
        "shuffle_seed": {**SEEDS, "default": SEED},
    }
    datasets = (ConversationDataset, GuardedStreamingDataset, StreamingDataset)
    numbers: dict[str, Any] = {
        "global_batch_size": _from_1(10**7),
        "max_tokens_per_microbatch": AT_LEAST_1,
        "prefetch_factor": _from_1(10**4),
        "num_workers": {"at_least": 0, "at_most": 1000},
        "timeout": {"at_least": 0, "at_most": 10**9},
    }
    dataset = section_of(*datasets, refused=refused | of_streaming, changes=changes, default=REQUIRED)
    return section_of(build_dataloader, refused=refused, changes=numbers | {"dataset": dataset}, default=default)


def _optimizer() -> Choice:
    changes: dict[str, Any] = {name: dict(AT_LEAST_0) for name in ("weight_decay", "eps")}
    changes["lr"] = {"check": rules.check_rates}
    changes["groups"] = {"annotation": list[dict[str, Any]] | None, "check": rules.check_own_rate}
    changes["layer_wise_lr_decay"] = {"check": rules.check_share}
    changes |= {key: {"check": rules.check_beta} for key in ("betas", "momentum", "rho", "alpha")}
    # What torchao's signature doesn't say.
    types = {"eps": float, "betas": tuple[float, float], "amsgrad": bool, "block_size": int}
    types["bf16_stochastic_round"] = bool
    changes_8bit = {**changes, **{key: {**changes.get(key, {}), "annotation": kind} for key, kind in types.items()}}
    sections = {}
    ours = ("model", "name", "params")
    for name in known_optimizers():
        functions: list[Any] = [build_optimizer]
        with suppress(ValueError):  # its package isn't installed: said when it is built
            functions.append(optimizer_class(name))
        said = changes_8bit if name == "adamw_8bit" else changes | OPTIMIZER_TYPES.get(name, {})
        sections[name] = section_of(*functions, leave_out=ours, refused=NO_SWITCHES, changes=said)
    common = section_of(build_optimizer, leave_out=ours, changes=changes).keys
    for name, cls in own_classes("optimizers").items():
        sections[name] = Section({**own_section(cls, (*ours, *common)).keys, **common})
    return Choice("name", sections, REQUIRED, refused=REFUSED_OPTIMIZERS)


def _named_sections(name: str) -> Section:
    """`snake_name: {keywords}`; of an `is_run_object` the keyword-only arguments come from the run."""
    no_use = refused(name) | {
        "console": "use trainer.log_to_console",
        "progress_bar": "use trainer.progress_bar",
    }
    clipping = {"clipping_type": {"annotation": Literal["norm", "value", "adaptive"]}, "clipping_threshold": ABOVE_0}
    changes: dict[str, Any] = {"gradient_clipping": clipping}
    sections: dict[str, Node] = {}
    own: Any = own_classes(name)  # type: ignore[arg-type]
    for key, cls in named_classes(name).items():
        parameters = inspect.signature(cls).parameters.values() if getattr(cls, "is_run_object", False) else ()
        supplied = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if key in own:
            sections[key] = own_section(cls, supplied)
        elif key not in no_use:
            keywords = inspect.signature(cls).parameters if cls.__module__.startswith("composer_path.") else {}
            seed = {"seed": {"default": SEED, **SEEDS}} if "seed" in keywords else {}
            said = changes.get(key, {}) | seed
            sections[key] = section_of(cls, leave_out=supplied, changes=said, default=ABSENT)
    known = {*named_classes(name), *FOUNDRY}
    hints = foreign_names(name) | {key: hint for key, hint in no_use.items() if key in known}
    return Section(sections, {}, {key: hint for key, hint in hints.items() if key not in own})


def _guards() -> Section:
    changes: dict[str, Any] = {
        "skips_in_a_row": AT_LEAST_1,
        "loss_spike": ABOVE_0,
        "stall_timeout": SECONDS,
        "stop_after": {"check": seconds_of},
    }
    return section_of(Guards, leave_out=("run_folder",), changes=changes, default={})


def _trainer() -> Section:
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
        **dict.fromkeys(("save_filename", "save_latest_filename"), "leave it out; checkpoints/ep<epochs>-ba<steps>"),
        **dict.fromkeys(("save_ignore_keys", "load_ignore_keys"), "leave it out; what is trained is saved and loaded"),
        "save_weights_only": "use callbacks.save_weights, which writes models to hand on",
        "load_strict_model_weights": "leave it out; weights always fit, or are refused",
        "load_exclude_algorithms": "leave it out; algorithms come from the YAML alone",
        "load_progress_bar": "leave it out",
        "profiler": "use callbacks.step_profile, which writes a trace into the run's folder",
    }
    objects = ("algorithm_passes", "console_stream", "load_object_store")
    return section_of(
        Trainer,
        CheckpointSaver,
        default=REQUIRED,
        leave_out=("folder", "keep", "fingerprint", "overwrite"),
        refused=elsewhere | dict.fromkeys(objects, "leave it out; it takes an object, which a YAML can't hold"),
        changes={
            "run_name": {"annotation": str, "default": REQUIRED, "check": rules.check_run_name},
            "max_duration": {"default": REQUIRED, "check": rules.check_max_duration},
            "eval_interval": {"check": rules.check_eval_interval},
            "console_log_interval": {"check": rules.check_console_interval},
            "save_interval": {"annotation": str | int | None},  # null saves nothing
            "save_num_checkpoints_to_keep": {"check": rules.check_number_to_keep},
            "best": {"annotation": str | None},  # what an evaluation measures
            "progress_bar": {"annotation": bool | None, "default": None},  # null: where a terminal can draw it
            # Composer's own default on a GPU is fp16.
            "precision": {"annotation": Literal[tuple(each.value for each in Precision)], "default": REQUIRED},
            "device": {"annotation": Literal["cpu", "gpu"] | None},
            "dist_timeout": SECONDS,
            "scale_schedule_ratio": ABOVE_0,
            "parallelism_config": Section({"fsdp": _fsdp()}),
        },
    )


def _fsdp() -> Choice:
    """Composer sets any word as an attribute of its FSDP1 configuration, so its fields are the list of keys."""
    mixed = Literal["param_dtype", "reduce_dtype", "buffer_dtype"]
    words: dict[str, Any] = {
        "mixed_precision": Literal["DEFAULT", "PURE", "FULL"] | dict[mixed, Literal["fp32", "bf16"]],
        "sharding_strategy": Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"],
        "backward_prefetch": Literal["BACKWARD_PRE", "BACKWARD_POST", "NONE"],
    }
    objects = ("device_mesh", "ignored_modules", "load_planner", "save_planner", "process_group")
    ours = dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_reentrant", "activation_cpu_offload"),
        "use execution.activation_checkpointing, which works with and without sharding",
    )
    ours |= dict.fromkeys(
        ("state_dict_type", "load_monolith_rank0_only", "sharded_ckpt_prefix_dir"),
        "leave it out; each rank writes its part of a checkpoint, which any number of ranks can read",
    )
    replicas, shards = "data_parallel_replicate_degree", "data_parallel_shard_degree"
    words |= {replicas: int | None, shards: int}
    numbers: dict[str, Any] = {replicas: AT_LEAST_1, shards: {"check": rules.check_shard_degree}}
    sections = {}
    for version, cls, defaults in ((1, FSDPConfig, FSDP1_DEFAULTS), (2, HybridFSDP2Config, {})):
        keys: dict[str, Node] = {
            name: key_of(name, words.get(name, kind), defaults.get(name, default), **numbers.get(name, {}))
            for name, kind, default in ((item.name, item.type, item.default) for item in fields(cls))
            if not name.startswith("_") and name not in (*objects, *ours)
        }
        sections[version] = Section(keys, refused=ours)
    return Choice("version", sections, selected=2)
