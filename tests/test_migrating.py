"""docs/migrating.md: every flag of the reference has a row, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from composer_path.config.schema import Choice, Node, Section
from composer_path.config.sections import config_schema

# The reference's argument classes, and what its two commands set of transformers' own.
OF_ITS_CLASSES = """
model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_vision_select_feature
data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio image_grid_pinpoints
cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits
lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr group_by_modality_length
"""
OF_ITS_COMMANDS = """
deepspeed bf16 output_dir num_train_epochs per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps evaluation_strategy save_strategy save_steps save_total_limit learning_rate weight_decay
warmup_ratio lr_scheduler_type logging_steps tf32 gradient_checkpointing dataloader_num_workers report_to
"""


@pytest.fixture(scope="module")
def rows(repo_root: Path) -> dict[str, tuple[str, str]]:
    """Flag -> our keys, what happens."""
    text = (repo_root / "docs" / "migrating.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| ?(.*?) ?\|$", text, re.MULTILINE)
    assert len(found) == len({flag for flag, *_ in found})
    return {flag: (keys, said) for flag, keys, said in found}


def is_there(node: Node, path: list[str]) -> bool:
    """Whether a YAML may have this key."""
    if not path:
        return True
    sections = node.sections.values() if isinstance(node, Choice) else [node] if isinstance(node, Section) else []
    chosen = isinstance(node, Choice) and path == [node.selector]
    return chosen or any(path[0] in one.keys and is_there(one.keys[path[0]], path[1:]) for one in sections)


def test_every_flag_of_the_reference_has_a_row(rows: dict[str, tuple[str, str]]) -> None:
    assert set(rows) == {*OF_ITS_CLASSES.split(), *OF_ITS_COMMANDS.split()}


def test_every_key_of_a_row_is_one_that_a_yaml_may_have(rows: dict[str, tuple[str, str]]) -> None:
    keys = [(flag, key) for flag, (named, _) in rows.items() for key in re.findall(r"`([\w.]+)`", named)]
    assert len(keys) > 30
    assert [pair for pair in keys if not is_there(config_schema(), pair[1].split("."))] == []
    assert not is_there(config_schema(), ["optimizer", "nothing"])
    mentioned = [key for _, said in rows.values() for key in re.findall(r"`([a-z]\w+(?:\.\w+)+)(?:: [^`]*)?`", said)]
    assert mentioned and [key for key in mentioned if not is_there(config_schema(), key.split("."))] == []


def test_what_has_no_key_has_a_reason(rows: dict[str, tuple[str, str]]) -> None:
    without = {flag: said for flag, (keys, said) in rows.items() if keys == "—"}
    assert without and all(without.values())


def test_options_of_commands_that_a_row_names_are_there(rows: dict[str, tuple[str, str]], repo_root: Path) -> None:
    options = [option for _, said in rows.values() for option in re.findall(r"`composer-path convert (--\w+)`", said)]
    source = (repo_root / "composer_path" / "commands" / "convert.py").read_text(encoding="utf-8")
    assert options and all(f'"{option}"' in source for option in options)
