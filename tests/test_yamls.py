"""The YAMLs that come with the project are right, complete, and differ only where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from composer_path.config.reading import load_config

YAMLS = sorted(Path(__file__).resolve().parent.parent.glob("yamls/**/*.yaml"))

# What a user overrides to start the product on test_data: paths and sizes, and on a CPU the precision.
TEST_DATA = [
    "variables.data_root=runs/demo/shards",
    "tokenizer.path=test_data/tokenizer",
    "model.vision_encoder.image_size=112",
    "model.vision_encoder.weights=null",
    "model.vision_encoder.kwargs={embed_dim: 64, depth: 2, num_heads: 4}",
    "model.projector={weights: null, pooler_weights: null}",
    "model.projector.pooler={dim: 64, num_queries: 16, num_heads: 4}",
    "model.language_model.path=null",
    "model.language_model.config=test_data/llama/config.json",
    "train_loader.dataset.max_seq_len=512",
    "train_loader.global_batch_size=8",
    "eval_loader.global_batch_size=8",
    "trainer.precision=fp32",
]

# The keys in which stage 2 differs from stage 1.
STAGES = {
    "model.projector.weights",
    "model.trainable",
    "train_loader.dataset.local",
    "train_loader.dataset.template",
    "eval_loader.dataset.local",
    "trainer.run_name",
}

# REFERENCE: the recipe that its users come from.
RECIPE = {
    "model.vision_encoder.name": "coca_vit-l",
    "model.vision_encoder.image_size": 448,
    "model.projector.type": "attn_pool+mlp2x_gelu",
    "train_loader.dataset.max_seq_len": 4096,
    "train_loader.dataset.fit": "pad",
    "train_loader.global_batch_size": 128,
    "train_loader.num_workers": 4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "scheduler.name": "cosine_with_warmup",
    "scheduler.t_warmup": "0.03dur",
    "trainer.max_duration": "1ep",
    "trainer.precision": "amp_bf16",
    "trainer.save_num_checkpoints_to_keep": 1,
}


@pytest.fixture(autouse=True)
def _in_repo_root(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists and empty mappings are values."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {key: value for name in node for key, value in flat(node[name], f"{path}.{name}".lstrip(".")).items()}


def written(path: Path) -> dict[str, Any]:
    """What a YAML says, interpolations as they stand."""
    return flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False))


def test_there_are_two_stages_for_the_product_and_two_for_the_demo(repo_root: Path) -> None:
    names = {path.relative_to(repo_root / "yamls").as_posix() for path in YAMLS}
    assert {"pretrain.yaml", "finetune.yaml", "demo/pretrain.yaml", "demo/finetune.yaml"} <= names


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_yaml_passes_every_check(path: Path) -> None:
    config = load_config(path)
    assert config.trainer.run_name == path.stem


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_product_starts_on_test_data_by_overriding_paths_and_sizes(repo_root: Path, stage: str) -> None:
    config = load_config(repo_root / "yamls" / f"{stage}.yaml", TEST_DATA)
    assert config.train_loader.dataset.local.startswith("runs/demo/shards/")
    assert config.eval_loader.dataset.max_seq_len == 512


@pytest.mark.parametrize(
    ("folder", "more"),
    [
        (
            ".",
            {
                "model.projector.pooler_weights",
                "optimizer.lr",
                "execution.activation_checkpointing",
                "execution.frozen_weights",
                "train_loader.max_tokens_per_microbatch",
            },
        ),
        ("demo", {"trainer.max_duration"}),
    ],
)
def test_the_two_stages_differ_only_where_the_stages_differ(repo_root: Path, folder: str, more: set[str]) -> None:
    first, second = (written(repo_root / "yamls" / folder / f"{name}.yaml") for name in ("pretrain", "finetune"))
    assert {key for key in first.keys() & second.keys() if first[key] != second[key]} >= STAGES
    differing = {key for key in first.keys() | second.keys() if first.get(key, ...) != second.get(key, ...)}
    assert {key for key in differing if not key.startswith("algorithms.")} <= STAGES | more


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_products_values_are_the_references_recipe(repo_root: Path, stage: str) -> None:
    values = written(repo_root / "yamls" / f"{stage}.yaml")
    assert {key: values.get(key) for key in RECIPE} == RECIPE
    assert values["optimizer.lr"] == {"pretrain": 2e-3, "finetune": 2e-5}[stage]
    assert values["train_loader.dataset.template"] == {"pretrain": "plain", "finetune": "llava_llama_2"}[stage]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_value_of_the_product_has_a_comment_or_stands_below_one(repo_root: Path, stage: str) -> None:
    lines = (repo_root / "yamls" / f"{stage}.yaml").read_text().splitlines()
    obvious = ("name:", "local:", "remote: null", "betas:", "eps:", "template:", "max_", "image_position:", "fit:")
    obvious += ("decoder:", "path:", "global_batch_size:", "num_workers:", "data_root:", "weights_root:", "shuffle:")
    obvious += ("lr_monitor:", "memory_monitor:", "run_name:", "activation_checkpointing:")
    bare = [
        line.strip()
        for line in lines
        if ":" in line and "#" not in line and not line.rstrip().endswith(":") and not line.strip().startswith(obvious)
    ]
    assert bare == []
