"""What a YAML may say: sections and keys, read from the signatures of the constructors that get them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_args

from composer_path.config.types import resolve_annotation
from composer_path.run.names import named_classes


@dataclass(frozen=True)
class Key:
    """One value: its type and further rules."""

    annotation: Any = Any
    required: bool = False
    choices: tuple[Any, ...] = ()
    at_least: int | None = None
    check: Callable[[Any], None] | None = None  # raises ValueError


@dataclass(frozen=True)
class Section:
    """A mapping of known keys. `refused` says what to do instead; an `open` section passes other keys on unchecked."""

    keys: Mapping[str, Key | Section | Choice]
    required: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    members: Section | None = None  # what stands under any other key, where names are free
    check: Callable[[Any], None] | None = None  # of the whole mapping, once its parts are right; raises ValueError


@dataclass(frozen=True)
class Choice:
    """A mapping whose key `selector` says which other keys there are: `{name: adamw, …}`."""

    selector: str
    sections: Mapping[Any, Section]
    default: Any = None
    required: bool = False


Node = Key | Section | Choice


def section_of(
    function: Callable[..., Any],
    *,
    leave_out: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    changes: Mapping[str, Node] | None = None,
    required: bool = False,
) -> Section:
    """The keywords of a function or class as a section.

    Args:
        function: Its signature is read; the class's `__init__` for a class.
        leave_out: Keywords that the run itself supplies.
        refused: Keywords that another key of the YAML says, and which.
        changes: Keys whose type or rule differs from the signature's.
        required: Whether the section must be there.
    """
    call = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    kinds = {parameter.kind for parameter in parameters}
    keys: dict[str, Node] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in leave_out:
            continue
        annotation = resolve_annotation(parameter.annotation, call)
        keys[parameter.name] = Key(annotation, required=parameter.default is parameter.empty)
    keys |= changes or {}
    for name in refused or {}:
        keys.pop(name, None)
    # Composer's base classes take (*args, **kwargs) and drop them: their heirs without an __init__ have no keywords.
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    return Section(keys, required, dict(refused or {}), passes_on)


@cache
def config_schema() -> Section:
    """The whole YAML. Imports the libraries whose signatures it reads (some seconds)."""
    return Section(
        {
            "version": Key(int, required=True, choices=(1,)),
            "seed": Key(int, required=True, at_least=0),
            "save_root": Key(str, required=True),
            "variables": Section({}, open=True),
            "tokenizer": _tokenizer(),
            "model": _model(),
            "execution": _execution(),
            "train_loader": _loader(required=True),
            "eval_loader": _loader(required=False),
            "optimizer": _optimizer(),
            "scheduler": Choice(
                "name",
                {name: section_of(cls) for name, cls in named_classes("scheduler").items()},
                required=True,
            ),
            "algorithms": _named_sections("algorithms"),
            "callbacks": _named_sections("callbacks"),
            "loggers": _named_sections("loggers"),
            "trainer": _trainer(),
        }
    )


def _tokenizer() -> Section:
    from composer_path.records.vocabulary import load_tokenizer

    return section_of(load_tokenizer, required=True)


def _model() -> Section:
    from composer_path.models.attention import AttentionBackend
    from composer_path.models.attentional_pooler import PoolerKind, PoolerSettings
    from composer_path.models.path_mllm import ModuleName
    from composer_path.models.projector import MlpSettings, untrained_projector
    from composer_path.models.vision_encoder import Tokens, untrained_vision_encoder
    from composer_path.weights.language_folder import build_language_model

    from_parts = {key: "leave it out; it is read from the built parts" for key in ("in_dim", "out_dim")}
    decided = {key: "leave it out; it follows from trainer.precision and the sharding" for key in ("dtype", "empty")}
    counts: dict[str, Node] = {key: Key(int, at_least=1) for key in ("dim", "num_queries", "num_heads")}
    counts["kind"] = Key(str, choices=get_args(PoolerKind))
    return Section(
        {
            "vision_encoder": section_of(
                untrained_vision_encoder,
                required=True,
                changes={
                    "name": Key(str, required=True, check=_check_vision_name),
                    "image_size": Key(int | None, at_least=1),
                    "tokens": Key(str, choices=get_args(Tokens)),
                    "weights": Key(str | None),
                },
            ),
            "projector": section_of(
                untrained_projector,
                required=True,
                refused=from_parts,
                changes={
                    "type": Key(str | None, check=_check_projector_type),
                    "weights": Key(str | None),
                    "pooler": section_of(PoolerSettings, changes=counts),
                    "mlp": section_of(MlpSettings, changes={"depth": Key(int, at_least=0)}),
                },
            ),
            "language_model": section_of(
                build_language_model,
                required=True,
                refused={**decided, "attention": "use model.attention"},
                changes={"config": Key(dict | str | None, check=_check_language_model)},
            ),
            "attention": Key(str, choices=get_args(AttentionBackend)),
            "trainable": Key(list[str], required=True, choices=get_args(ModuleName)),
        },
        required=True,
    )


def _execution() -> Section:
    from composer_path.models.execution import Checkpointing, Fusion, choose_execution

    words = {"activation_checkpointing": get_args(Checkpointing), "fusion": get_args(Fusion)}
    numbers = ("vision_chunk", "loss_chunk", "row_multiple")
    return section_of(
        choose_execution,
        leave_out=("model",),
        changes={
            # A bare `off` is false to YAML.
            **{key: Key(str | bool, choices=(*choices, False)) for key, choices in words.items()},
            **{key: Key(int | None, at_least=1) for key in numbers},
        },
    )


def _check_vision_name(name: str) -> None:
    import difflib

    import timm

    from composer_path.models.open_clip_trunk import open_clip_vision_config

    family, _, model = name.partition("/")
    if family == "timm" and not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models("*vit*"), n=2)
        raise ValueError(f"timm has no model '{model}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if family == "open_clip":
        open_clip_vision_config(model)
    if name != "coca_vit-l" and (not model or family not in ("timm", "open_clip")):
        raise ValueError(f"found '{name}'; it must be coca_vit-l, timm/<a timm ViT> or open_clip/<an open_clip model>")


def _check_projector_type(name: str | None) -> None:
    from composer_path.models.projector import REFERENCE_TYPE

    if name is not None and not REFERENCE_TYPE.fullmatch(name):
        raise ValueError(
            f"found '{name}'; it must be attn_pool+mlp2x_gelu, attn_pool+linear, linear, mlpNx_gelu or identity"
        )


def _check_language_model(config: dict[str, Any] | str | None) -> None:
    """A configuration that transformers knows, without keys that it doesn't, and one that our attention can serve."""
    import difflib

    from transformers import CONFIG_MAPPING

    from composer_path.models.language_model import load_language_model_config

    if isinstance(config, Mapping) and config.get("model_type") in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[config["model_type"]]
        known = set(cls().to_dict()) | set(inspect.signature(cls.__init__).parameters)
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"unknown key '{key}' for model_type {config['model_type']}{hint}")
    if config is not None:
        load_language_model_config(dict(config) if isinstance(config, Mapping) else config)


def _loader(required: bool) -> Section:
    from streaming import StreamingDataset

    from composer_path.batches.collator import LOSS_AVERAGES
    from composer_path.batches.dataset import ConversationDataset
    from composer_path.batches.loader import build_dataloader
    from composer_path.batches.mixture import build_stream, check_streams
    from composer_path.stream.guarded import GuardedStreamingDataset

    built = {
        key: "leave it out; it is read from the model"
        for key in ("tokenizer", "num_image_tokens", "image_size", "pad_color", "mean", "std")
    }
    streamed = section_of(
        StreamingDataset,
        refused={
            "batch_size": "use global_batch_size",
            "download_retry": "use fault_timeout, the seconds in which a file must have arrived",
            "stream_name": "use streams",
            "stream_config": "use streams",
        },
        changes={"num_canonical_nodes": Key(int | None, at_least=1)},
    )
    guarded = section_of(GuardedStreamingDataset, changes={"fault_timeout": Key(float, check=_check_above_zero)})
    stream = section_of(build_stream, leave_out=("name",), changes={"template": Key(str | dict, check=_check_template)})
    own = section_of(
        ConversationDataset,
        refused=built,
        required=True,
        changes={
            # A template's settings are checked by the template itself.
            "template": Key(str | dict, check=_check_template),
            "max_seq_len": _positive(section_of(ConversationDataset), "max_seq_len"),
            "image_position": Key(str, choices=("front", "inline")),
            "fit": Key(str, choices=("pad", "crop")),
            "decoder": Key(str, choices=("pil", "torchvision")),
            "streams": Section({}, members=stream, check=check_streams),
        },
    )
    keys = {**streamed.keys, **guarded.keys, **own.keys}
    dataset = replace(own, keys=keys, refused={**streamed.refused, **own.refused}, open=False)
    loader = section_of(build_dataloader)
    return section_of(
        build_dataloader,
        required=required,
        refused={**built, "batch_size": "use global_batch_size"},
        changes={
            "dataset": dataset,
            "global_batch_size": _positive(loader, "global_batch_size"),
            "max_tokens_per_microbatch": _positive(loader, "max_tokens_per_microbatch"),
            "num_workers": replace(_key(loader, "num_workers"), at_least=0),
            "loss_average": Key(str, choices=LOSS_AVERAGES),
        },
    )


def _check_above_zero(value: float) -> None:
    if value <= 0:
        raise ValueError(f"found {value}; it must be above 0")


def _check_template(template: str | dict[str, Any]) -> None:
    from composer_path.records.prompts import get_template

    get_template(template)


def _key(section: Section, name: str) -> Key:
    key = section.keys[name]
    assert isinstance(key, Key)
    return key


def _positive(section: Section, name: str) -> Key:
    return replace(_key(section, name), at_least=1)


def _optimizer() -> Choice:
    from composer_path.run.optimizer import OPTIMIZERS, optimizer_class

    changes: dict[str, Node] = {
        "lr": Key(float | dict[str, float], required=True),
        "weight_decay": Key(float, at_least=0),
        "eps": Key(float, at_least=0),
    }
    sections: dict[Any, Section] = {}
    for name in OPTIMIZERS:
        try:
            sections[name] = section_of(optimizer_class(name), leave_out=("params",), changes=changes)
        except ValueError:  # its package isn't installed: said when it is built
            sections[name] = Section(changes, open=True)
    return Choice("name", sections, required=True)


def _named_sections(name: str) -> Section:
    """`snake_name: {keywords}`; our own classes' keyword-only arguments come from the run, not from the YAML."""
    refused = {
        "checkpoint_saver": "use trainer.save_interval and its neighbours",
        "console": "use trainer.log_to_console",
        "progress_bar": "use trainer.progress_bar",
    }
    sections: dict[str, Node] = {}
    for key, cls in named_classes(name).items():
        supplied: tuple[str, ...] = ()
        if cls.__module__.startswith("composer_path."):
            parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
            supplied = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if key not in refused:
            sections[key] = section_of(cls, leave_out=supplied)
    return Section(sections, refused={key: hint for key, hint in refused.items() if key in named_classes(name)})


def _trainer() -> Section:
    from composer import Trainer
    from composer.core import Precision

    elsewhere = {
        "model": "use the section model",
        "train_dataloader": "use the section train_loader",
        "train_dataloader_label": "leave it out; it is always 'train'",
        "eval_dataloader": "use the section eval_loader",
        "optimizers": "use the section optimizer",
        "schedulers": "use the section scheduler",
        "algorithms": "use the section algorithms",
        "callbacks": "use the section callbacks",
        "loggers": "use the section loggers",
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
        refused={
            **elsewhere,
            **{key: "leave it out; it takes an object, which a YAML can't hold" for key in objects},
        },
        changes={
            "run_name": Key(str, required=True),
            "max_duration": replace(_key(section_of(Trainer), "max_duration"), required=True),
            "save_interval": Key(str | int | None),  # null saves nothing
            # Composer's own default on a GPU is fp16.
            "precision": Key(str, required=True, choices=tuple(precision.value for precision in Precision)),
            "device": Key(str | None, choices=("cpu", "gpu", None)),
            "parallelism_config": Section({"fsdp": _fsdp()}),
        },
    )


def _fsdp() -> Choice:
    """Composer sets any word as an attribute of its FSDP1 configuration, so its fields are the list of keys."""
    from composer.utils.parallelism import FSDP2Config, FSDPConfig

    mixed = Literal["param_dtype", "reduce_dtype", "buffer_dtype"]
    both: dict[str, Node] = {
        "mixed_precision": Key(Literal["DEFAULT", "PURE", "FULL"] | dict[mixed, Literal["fp32", "bf16"]]),
        "state_dict_type": Key(Literal["full", "sharded"]),
    }
    first: dict[str, Node] = {
        "sharding_strategy": Key(
            Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
        ),
        "backward_prefetch": Key(Literal["BACKWARD_PRE", "BACKWARD_POST", "NONE"]),
    }
    objects = ("device_mesh", "ignored_modules", "load_planner", "save_planner", "process_group")
    ours = {
        key: "use execution.activation_checkpointing, which works with and without sharding"
        for key in ("activation_checkpointing", "activation_checkpointing_reentrant", "activation_cpu_offload")
    }
    sections = {}
    for version, cls, special in ((1, FSDPConfig, both | first), (2, FSDP2Config, both)):
        keys: dict[str, Node] = {
            item.name: Key(item.type)
            for item in fields(cls)
            if not item.name.startswith("_") and item.name not in objects and item.name not in ours
        }
        sections[version] = Section(keys | special, refused=ours)
    return Choice("version", sections, default=2)
