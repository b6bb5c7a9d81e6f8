"""What several keys of a YAML say together: each disagreement is one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from composer_path.batches.mixture import asking_template, check_streams, template_of
from composer_path.config.parts import of_the_parts
from composer_path.config.types import hint
from composer_path.encoders.table import ENCODERS
from composer_path.models.execution import FROZEN_ONLY, NO_DORA
from composer_path.models.lora import NEEDED, has_peft
from composer_path.models.open_clip_trunk import open_clip_vision_config
from composer_path.models.pattern import MODULES, learning_modules, module_of, modules_of
from composer_path.models.rounded_linear import NF4_NEEDS, has_nf4
from composer_path.run.evaluations import HELD_OUT, OTHERS, loader_sections
from composer_path.run.optimizer import ADAFACTOR
from composer_path.run.sharding import check_fsdp1, mesh_degrees
from composer_path.weights.projector_file import EITHER

Get = Callable[[str], Any]  # a value by its path; None where it isn't there or couldn't be read


def disagreements(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """What doesn't go together in complete, plain values; `given` is the YAML as it stands, with its overrides."""

    def get(path: str) -> Any:
        node: Any = values
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node if isinstance(node, bool | int | float | str | list | Mapping) else None

    yield from _of_the_model(get)
    yield from _of_what_is_trained(get)
    yield from _of_the_trainer(get, given)
    yield from of_the_parts(get)
    for name in loader_sections(values):
        if isinstance(get(name), Mapping):
            yield from _of_a_loader(get, name)
    yield from _of_evaluations(get)


def _of_the_model(get: Get) -> Iterator[str]:
    model = get("model.language_model")
    if isinstance(model, Mapping) and (model.get("path") is None) == (model.get("config") is None):
        found = "neither" if model.get("path") is None else "both"
        yield f"model.language_model: found {found} of path (weights) and config (random); give one of them"
    if get("model.projector.weights") is not None and get("model.projector.pooler_weights") is not None:
        yield f"model.projector: found weights and pooler_weights; {EITHER}"
    size, patch = get("model.vision_encoder.image_size"), _patch_size(get)
    if isinstance(size, int) and patch and size % patch:
        found, near = f"found {size}, which is no multiple of the patch size {patch}", max(1, size // patch) * patch
        yield f"model.vision_encoder.image_size: {found}; take {near} or {near + patch}"


def _patch_size(get: Get) -> int | None:
    """Side of a vision encoder's patches, pixels; None where neither keywords nor name tell."""
    name, size = str(get("model.vision_encoder.name")), get("model.vision_encoder.kwargs.patch_size")
    if size is None and name in ENCODERS:
        return ENCODERS[name].patch_size
    if size is None and name.startswith("open_clip/"):
        try:
            size = open_clip_vision_config(name.removeprefix("open_clip/"))[0].get("patch_size")
        except ValueError:  # no such model, which is already reported
            return None
    if size is None and (by_name := re.search(r"patch(\d+)", name)):
        size = int(by_name[1])
    return size if isinstance(size, int) else None


def _of_what_is_trained(get: Get) -> Iterator[str]:
    trainable, rates = get("model.trainable"), get("optimizer.lr")
    lora = get("model.lora") if isinstance(get("model.lora"), Mapping) else {}
    lora = {name: own for name, own in lora.items() if isinstance(own, Mapping)}
    if lora and not has_peft():
        yield f"model.lora: {NEEDED}"
    if trainable == [] and not lora:
        yield "model.trainable: found an empty list; name what this stage trains, as in [projector]"
    if not isinstance(trainable, list) or not (trainable or lora):
        return
    if twice := [name for i, name in enumerate(trainable) if name in trainable[:i]]:
        yield f"model.trainable: found {twice[0]} twice; name each once"
    if not all(isinstance(pattern, str) for pattern in trainable):
        return  # already reported
    for name in sorted({*lora} & {*modules_of(trainable)}):
        yield f"model.lora.{name}: stands beside weights that stay frozen; take {name} out of model.trainable, or this"
    yield from _of_rounded_weights(get, modules_of(trainable), lora.get("language_model", {}))
    trainable = learning_modules({"trainable": trainable, "lora": lora})
    rates = rates if isinstance(rates, Mapping) else trainable
    for name in [name for name in rates if name not in trainable]:
        fix = hint(name, trainable, f"there are {', '.join(map(str, trainable))}")
        yield f"optimizer.lr.{name}: is not trained; {fix}"
    for name in [name for name in trainable if name not in rates]:
        yield f"optimizer.lr.{name}: is missing; give each trained module a rate"
    yield from _of_the_groups(get, trainable)
    if get("execution.vision_chunk") is not None and "vision_encoder" in trainable:
        why = "saves nothing where vision_encoder is trained (its activations are kept anyway)"
        yield f"execution.vision_chunk: {why}; remove it"


def _of_rounded_weights(get: Get, trained: list[str], lora: Mapping[str, Any]) -> Iterator[str]:
    rounding = get("execution.frozen_weights")
    if rounding is None:
        return
    where = f"execution.frozen_weights: found {rounding}"
    if "language_model" in trained:
        yield f"{where}; {FROZEN_ONLY}"
    if lora.get("use_dora"):
        yield f"{where}; {NO_DORA}"
    if get("trainer.parallelism_config.fsdp") is not None:
        why = "FSDP shards weights of one dtype; trainer.parallelism_config=null, which this lever makes room for"
        yield f"{where}; {why}, or leave it out"
    if rounding == "nf4" and not has_nf4():
        yield f"execution.frozen_weights: {NF4_NEEDS}"


def _of_the_groups(get: Get, trained: list[str]) -> Iterator[str]:
    groups = get("optimizer.groups")
    for at, group in enumerate(groups if isinstance(groups, list) else ()):
        where, match = f"optimizer.groups[{at}]", group.get("match") if isinstance(group, Mapping) else None
        if not isinstance(match, str) or module_of(match) not in MODULES:
            continue  # already reported
        if module_of(match) not in trained:
            yield f"{where}.match: found '{match}', which is not trained; there are {', '.join(trained)}"
        if group.get("t_warmup") is not None and get("scheduler.t_warmup") is None:
            yield f"{where}.t_warmup: '{get('scheduler.name')}' has no warm-up; take one with_warmup, or remove this"
        elif group.get("t_warmup") is not None and get("scheduler.reference_timing") is False:
            yield f"{where}.t_warmup: needs scheduler.reference_timing; leave that true, or remove this"


def _of_the_trainer(get: Get, given: Mapping[str, Any]) -> Iterator[str]:
    trainer, clipping = get("trainer"), "algorithms.gradient_clipping.clipping_type"
    trainer = trainer if isinstance(trainer, Mapping) else {}
    if get("trainer.autoresume") and trainer.get("save_interval", "") is None:
        found = "has nothing to go on from while save_interval is null"
        yield f"trainer.autoresume: {found}; give an interval or remove this"
    if get("trainer.parallelism_config.fsdp.version") == 1:
        try:
            check_fsdp1()
        except ValueError as error:
            yield str(error)
        if get(clipping) == "adaptive":
            yield f"{clipping}: found adaptive, which FSDP 1 can't; take norm or value, or fsdp.version 2"
    # One rank need not be one that trains: `plan` reads the YAML for others, in a process that may have trained before.
    fsdp, ranks = get("trainer.parallelism_config.fsdp"), int(os.environ.get("WORLD_SIZE", "1"))
    if fsdp is not None and ranks > 1:
        try:
            mesh_degrees(fsdp, ranks)
        except (TypeError, KeyError):  # text for a number, or no such version, which is already reported
            pass
        except ValueError as error:
            yield str(error)
    if get("optimizer.name") == "adafactor" and get("trainer.parallelism_config.fsdp") is not None:
        yield f"optimizer.name: found 'adafactor'; {ADAFACTOR}"
    if get("trainer.best") is not None and trainer.get("save_interval") is None:
        yield "trainer.best: needs trainer.save_interval; give it or remove this"
    written = given.get("trainer")
    for key in ("eval_interval", "eval_subset_num_batches"):
        if not {"eval_loader", OTHERS} & given.keys() and isinstance(written, Mapping) and written.get(key) is not None:
            yield f"trainer.{key}: does nothing without the section eval_loader; add it or remove this"


def _of_evaluations(get: Get) -> Iterator[str]:
    """Their names, and whether the best checkpoint goes by one of them."""
    others, best = get(OTHERS), get("trainer.best")
    others = others if isinstance(others, Mapping) else {}
    for name in others:
        if name in (HELD_OUT, "train") or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,40}", str(name)):
            found = f"found the name '{str(name)[:60]}'"
            yield f"{OTHERS}: {found}; it must be letters and digits, and neither {HELD_OUT} (eval_loader) nor train"
    held_out = {HELD_OUT: get("eval_loader"), **others}
    labels = [name for name, section in held_out.items() if section is not None]
    if best is None:
        return
    metrics = ["token_loss", *(get("eval_metrics") or {})]
    known = [f"{label}/{metric}" for label in labels for metric in metrics]
    if not known:
        yield "trainer.best: needs eval_loader; give it or remove this"
    elif best not in known:
        yield f"trainer.best: found '{best}'; {hint(best, known, 'there are ' + ', '.join(known))}"


def _of_a_loader(get: Get, name: str) -> Iterator[str]:
    dataset, ranks = get(f"{name}.dataset"), int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(dataset, Mapping) and (dataset.get("local") is None) == (dataset.get("streams") is None):
        # Without a folder of its own Streaming takes one in /tmp, which a second run can't use again.
        found = "found null; it must be text: the folder of the shards, or of their cache (or give streams)"
        both = "is given beside streams; remove one of them"
        yield f"{name}.dataset.local: {found if dataset.get('local') is None else both}"
    streams = get(f"{name}.dataset.streams")
    if isinstance(streams, Mapping) and all(isinstance(keywords, Mapping) for keywords in streams.values()):
        yield from _of_a_mixture(streams, get(f"{name}.dataset.template"), name)
    most, longest = get(f"{name}.max_tokens_per_microbatch"), get(f"{name}.dataset.max_seq_len")
    if isinstance(most, int) and isinstance(longest, int) and most < longest:
        found, fix = f"found {most}, less than {name}.dataset.max_seq_len {longest}", "raise the one or lower the other"
        yield f"{name}.max_tokens_per_microbatch: {found}: one sample may not fit; {fix}"
    batch = get(f"{name}.global_batch_size")
    if isinstance(batch, int) and batch % ranks:
        fix = f"take {max(1, batch // ranks) * ranks}, or another number of ranks"
        yield f"{name}.global_batch_size: found {batch}, which {ranks} ranks don't divide; {fix}"


def _of_a_mixture(streams: Mapping[str, Any], template: Any, name: str) -> Iterator[str]:
    try:
        check_streams(streams)
    except ValueError as error:
        yield f"{name}.dataset.{error}"
    except TypeError:  # text for a number, which is already reported
        pass
    for stream, keywords in [("", {}), *streams.items()]:  # first the template of streams that name none
        own = keywords.get("template") or template
        try:
            template_of(own)
        except (ValueError, TypeError):  # no such template, which is already reported
            return
        try:
            template_of(own, keywords.get("system"))
        except ValueError as error:
            yield f"{name}.dataset.streams.{stream}.{str(error).removeprefix('template.')}"
            return
    if name == "train_loader":  # the template that the trained model will be asked with is known before it is trained
        try:
            asking_template(template, streams)
        except ValueError as error:
            yield f"{name}.dataset.{error}"
