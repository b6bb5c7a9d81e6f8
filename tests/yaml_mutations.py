"""Random changes to a YAML: values of every kind, keys removed, renamed, doubled and added, sections swapped."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """A value as it is written."""

    text: str


HERE = "<here>"  # becomes the value's own path
SCALARS = (
    *("null", "~", "true", "false", "off", "0", "-1", "1", "7", "0.5", "-0.0", "1.0", "1e-320", "2.5e+9", "1e11"),
    *("1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, ".nan", ".inf", "-.inf", "1e999", "-1e999", "0x10", "0o17", "1_000"),
    *("2026-11-27", "2026-11-27 10:00:00", "12:30:45", "!!binary aGVsbG8=", "!!str 5", "!!int x", "!!float 1", "! a"),
    *(
        "!!python/object/apply:os.system [true]",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
        "!own 1",
        "!!null x",
    ),
    *("!!set {a, b}", "!!omap [a: 1]", "&a [*a]", "&b {b: *b}", "*none", "<<", "=", "???", "'???'"),
)
TEXTS = (
    *(
        "",
        " ",
        "a",
        "nan",
        "null",
        "true",
        "5",
        "-1",
        "1e-3",
        "0ep",
        "1ep",
        "-1ba",
        "1e400ep",
        "1.5ep",
        "0.1dur",
        "3dur",
    ),
    *(
        "10sec",
        "9" * 40 + "ep",
        "10gb",
        "-5kb",
        "1e400gb",
        "50k",
        "-50k",
        ".",
        "..",
        "/",
        "/nope",
        "../..",
        "~",
        "~nobody/x",
    ),
    *(
        "s3://",
        "s3://bucket/set",
        "gs://b",
        "ftp://h/x",
        "http://h",
        "hf://",
        "s3:///x",
        "file:///x",
        "test_data",
        "LICENSE",
    ),
    *(
        "a" * 5000,
        "a/" * 3000,
        "\x00",
        "a\x00b",
        "\x1b[31mred",
        "a\nb",
        "\t",
        "{}",
        "{a}",
        "{a!r:>{b}}",
        "{0}",
        "%s",
        "\ud800",
    ),
    *(
        "\u202e",
        "é",
        "e\u0301",
        "日本",
        "🧬",
        "-",
        "_",
        "a.b",
        "a[0]",
        "a=b",
        "a: b",
        "#",
        "&",
        "*",
        "<image>",
        "[INST]",
    ),
    *("${", "}", "${}", "${seed}", "${trainer}", "${train_loader.dataset}", "${none}", "${.seed}", "${..seed}", "${.}"),
    *(
        f"${{{HERE}}}",
        f"a${{{HERE}}}",
        "${a:b}",
        "${oc.env:HOME}",
        "${oc.env:NONE_SUCH}",
        "${oc.env:NONE_SUCH,null}",
        "$",
    ),
    *(
        "${oc.env:}",
        "${oc.env}",
        "${oc.env:[1]}",
        "${oc.env:{a: 1}}",
        "${oc.decode:'['}",
        "${oc.decode:null}",
        "${oc.decode:[1]}",
    ),
    *(
        "${oc.decode:'{a: 1}'}",
        "${oc.decode:'${trainer}'}",
        "${oc.decode:5}",
        "${oc.create:{a: 1}}",
        "${oc.select:seed}",
    ),
    *(
        "${oc.dict.keys:trainer}",
        "${${seed}}",
        "${oc.${seed}:1}",
        "${trainer.run_name}",
        "${train_loader.global_batch_size}",
    ),
    *(
        "${optimizer.betas[0]}",
        "${optimizer.betas[9]}",
        "${optimizer[",
        "\\${seed}",
        "${seed}${seed}",
        "${algorithms}",
        "${seed:}",
    ),
    *(
        "adamw",
        "fp32",
        "amp_bf16",
        "coca_vit-l",
        "timm/",
        "timm/resnet50",
        "timm/vit_tiny_patch16_224",
        "open_clip/ViT-B-32",
    ),
    *("linear", "identity", "mlp99999999999x_gelu", "mlp3x_gelu", "attn_pool+linear", "llava_llama_2", "chat_template"),
)
LISTS = (
    *(
        "[]",
        "[1, 2]",
        "[null]",
        "[[1], [2]]",
        "[{}]",
        "[{a: 1}]",
        "['']",
        "[true]",
        "[projector]",
        "[[[[[[]]]]]]",
        "[.nan]",
    ),
    *(
        "[0, 0, 0]",
        "[-1, 1, 1]",
        "[1, 2]",
        "[0.5, 0.5, 0.5]",
        "[0.9, 1.0]",
        "[1" + "0" * 30 + "]",
        "[a, b, c]",
        "['${seed}']",
    ),
    *("[2026-11-27]", "['${none}']", "[projector, projector]", "[vision_encoder, projector, language_model]", "[???]"),
    *("[!!binary aGk=]", "[1" + ", 1" * 500 + "]", "[" * 400 + "]" * 400),
)
MAPPINGS = (
    *(
        "{}",
        "{a: 1}",
        "{1: 2}",
        "{null: 1}",
        "{1.5: 2}",
        "{true: 1}",
        "{'': 1}",
        "{[1, 2]: 3}",
        "{2026-11-27: 1}",
        "{a: }",
    ),
    *(
        "{name: adamw}",
        "{name: }",
        "{name: [adamw]}",
        "{name: {a: 1}}",
        "{version: 1}",
        "{local: 5}",
        "{path: 5}",
        "{a.b: 1}",
    ),
    *(
        "{config: {model_type: llama, hidden_size: 30, num_attention_heads: 7}}",
        "{name: plain, system: 5}",
        "{name: 5}",
    ),
    *(
        "{name: llava_llama_2, system: [1]}",
        "{name: chat_template, system: '\\0'}",
        "{<<: {a: 1}}",
        "{<<: 1}",
        "{.nan: 1}",
    ),
    *(
        "{a: {local: x}}",
        "{a: {local: x, proportion: 1}, b: {local: x, repeat: 2}}",
        "{'{}': {local: x}}",
        "{!!binary aGk=: 1}",
    ),
    *(
        "{model_type: llama}",
        "{model_type: bert}",
        "{model_type: [a]}",
        "{model_type: llama, hidden_size: x}",
        "{a: ???}",
    ),
    *(
        "{fsdp: {version: 2}}",
        "{fsdp: {version: 9}}",
        "{fsdp: }",
        "{tp: {a: 1}}",
        "{'${seed}': 1}",
        "{__class__: 1}",
        "{self: 1}",
    ),
    *("{model_type: llama, vocab_size: -1}", "{model_type: llama, num_hidden_layers: 0, rope_scaling: 5}", "{keys: 1}"),
)
KEYS = (
    "a",
    "",
    "name",
    "version",
    "self",
    "args",
    "kwargs",
    "5",
    "null",
    "a.b",
    "${seed}",
    "__init__",
    "é",
    "<<",
    "x" * 999,
)


def value_of(random_: random.Random, path: str) -> Raw:
    """Some value, as it is written in a YAML."""
    kind = random_.choice((SCALARS, TEXTS, LISTS, MAPPINGS))
    text = random_.choice(kind)
    return Raw(quoted(text.replace(HERE, path)) if kind is TEXTS else text)


def quoted(text: str) -> str:
    return json.dumps(text)  # lone surrogates as escapes


def written(node: Any) -> str:
    """A tree as a YAML in one line; a mapping is a list of pairs, so that a key can stand twice."""
    if isinstance(node, Raw):
        return node.text
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{quoted(key)}: {written(value)}" for key, value in node.items) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    return json.dumps(node)


@dataclass
class Pairs:
    """A mapping in which a key can stand twice."""

    items: list[list[Any]]


def pairs(node: Any) -> Any:
    """A plain tree with `Pairs` for its mappings."""
    if isinstance(node, dict):
        return Pairs([[key, pairs(value)] for key, value in node.items()])
    return [pairs(item) for item in node] if isinstance(node, list) else node


def places(node: Any, path: str = "") -> Iterator[tuple[Pairs, int, str]]:
    """Every key of a tree: the mapping in which it stands, where there, and its path."""
    for i, (key, value) in enumerate(node.items if isinstance(node, Pairs) else ()):
        where = f"{path}.{key}" if path else str(key)
        yield node, i, where
        yield from places(value, where)


def mutate(tree: Pairs, random_: random.Random) -> str:
    """Change something in a tree; returns what and where."""
    mapping, i, path = random_.choice(list(places(tree)))
    change = random_.choices(("value", "remove", "rename", "double", "add", "swap"), (12, 1, 1, 1, 2, 2))[0]
    if change == "value":
        mapping.items[i][1] = value_of(random_, path)
    elif change == "remove":
        del mapping.items[i]
    elif change == "rename":
        mapping.items[i][0] = random_.choice((*KEYS, path.rpartition(".")[2][:-1]))
    elif change == "double":
        mapping.items.append(list(mapping.items[i]))
    elif change == "add":
        mapping.items.append([random_.choice(KEYS), value_of(random_, path)])
    else:
        other, j, _ = random_.choice(list(places(tree)))
        mapping.items[i][1], other.items[j][1] = other.items[j][1], mapping.items[i][1]
        if _holds_itself(tree):
            mapping.items[i][1], other.items[j][1] = other.items[j][1], mapping.items[i][1]
    return f"{change} {path}"


def _holds_itself(node: Any, above: tuple[int, ...] = ()) -> bool:
    return id(node) in above or any(
        _holds_itself(value, (*above, id(node))) for _, value in (node.items if isinstance(node, Pairs) else ())
    )
