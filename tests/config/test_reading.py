"""A YAML is read complete: values, overrides, interpolations and every default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_problems import problems_of
from omegaconf import OmegaConf
from streaming import StreamingDataset
from torch.optim import AdamW

from composer_path.config.reading import load_config, plain
from composer_path.config.schema import section_of

# Nothing that has a default.
SHORT = """
version: 1
seed: 17
save_root: runs
tokenizer: {path: test_data/tokenizer}
model:
  vision_encoder: {name: coca_vit-l}
  projector: {pooler: {}, mlp: {}}
  language_model: {config: test_data/llama/config.json}
  trainable: [projector]
train_loader: {dataset: {local: train}, global_batch_size: 8}
optimizer: {name: adamw, lr: 1.0e-3}
scheduler: {name: constant}
algorithms: {stain_jitter: }
callbacks: {save_weights: , batch_report: , source_report: , speed_report: }
trainer: {run_name: short, max_duration: 1ep, precision: fp32, parallelism_config: {fsdp: {}}}
"""


def test_an_evaluation_interval_needs_held_out_data_unless_they_are_switched_off(demo: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(demo)
    del config["eval_loader"]
    config.trainer.eval_interval = "1ep"
    OmegaConf.save(config, tmp_path / "without.yaml")
    line = "trainer.eval_interval: does nothing without the section eval_loader; add it or remove this"
    assert problems_of(tmp_path / "without.yaml") == [line]
    assert load_config(demo, ["eval_loader=null", "trainer.eval_interval=1ep"]).eval_loader is None


def test_every_required_key_that_is_missing_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("version: 1\nmodle: {}\n")
    problems = problems_of(path)
    missing = {problem.split(":")[0] for problem in problems if ": is missing" in problem}
    assert missing == {"seed", "save_root", "tokenizer", "model", "train_loader", "optimizer", "scheduler", "trainer"}
    assert any("is it modle?" in problem for problem in problems)


def test_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.yaml") == ["there is no such file"]
    assert problems_of(tmp_path) == ["can't be read: Is a directory"]
    path = tmp_path / "bad.yaml"
    for text in ("a: [", "seed: 1\nseed: 2\n"):
        path.write_text(text)
        assert "can't be read as YAML" in problems_of(path)[0]
    path.write_text("- 1\n")
    assert "must be a mapping" in problems_of(path)[0]


def test_a_choice_brings_its_own_keys(demo: Path, tmp_path: Path) -> None:
    assert "scheduler.alpha_f: unknown key" in problems_of(demo, "scheduler.name=constant_with_warmup")[0]
    assert (
        "fsdp.reshard_after_forward: unknown key" in problems_of(demo, "trainer.parallelism_config.fsdp.version=1")[0]
    )
    config = OmegaConf.load(demo)
    config.scheduler = {"name": "constant_with_warmup", "t_warmup": "10ba", "alpha": 0.5}
    path = tmp_path / "other.yaml"
    OmegaConf.save(config, path)
    assert load_config(path).scheduler.alpha == 0.5


@pytest.mark.skipif(torch.__version__ >= "2.8", reason="FSDP1 is for torch 2.7")
def test_fsdp_1_brings_its_own_keys(demo: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(demo)
    config.trainer.parallelism_config.fsdp = {"version": 1, "sharding_strategy": "HYBRID_SHARD"}
    path = tmp_path / "other.yaml"
    OmegaConf.save(config, path)
    fsdp = load_config(path).trainer.parallelism_config.fsdp
    assert fsdp.version == 1 and fsdp.sync_module_states


def test_sections_left_out_are_there_and_empty(demo: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(demo)
    for section in ("algorithms", "callbacks", "loggers", "eval_loader"):
        del config[section]
    del config.trainer["eval_interval"]
    path = tmp_path / "short.yaml"
    OmegaConf.save(config, path)
    loaded = load_config(path)
    assert loaded.algorithms == loaded.callbacks == loaded.loggers == {}
    assert loaded.eval_loader is None


def test_values_of_environment_variables_are_used_but_not_written(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSER_PATH_TEST_ROOT", "secret_place")
    monkeypatch.setenv("COMPOSER_PATH_TEST_BATCH", "32")
    config = load_config(
        demo,
        [
            "save_root=${oc.env:COMPOSER_PATH_TEST_ROOT}",
            "train_loader.global_batch_size=${oc.decode:${oc.env:COMPOSER_PATH_TEST_BATCH}}",
        ],
    )
    assert config.save_root == "secret_place"
    assert config.train_loader.global_batch_size == 32
    assert "secret_place" not in OmegaConf.to_yaml(config)


def test_an_environment_variable_is_text_until_it_is_decoded(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSER_PATH_TEST_BATCH", "32")
    problems = problems_of(demo, "train_loader.global_batch_size=${oc.env:COMPOSER_PATH_TEST_BATCH}")
    assert "oc.decode" in problems[0]


def test_overrides_replace_values_and_interpolations_follow(demo: Path) -> None:
    config = load_config(demo, ["variables.shards=elsewhere", "train_loader.dataset.max_seq_len=256"])
    assert config.train_loader.dataset.local == "elsewhere/captions"
    assert config.eval_loader.dataset.max_seq_len == 256


@pytest.mark.parametrize("name", ["pretrain", "finetune", "demo/pretrain", "demo/finetune"])
def test_a_complete_configuration_written_and_read_again_is_the_same(
    repo_root: Path, name: str, tmp_path: Path
) -> None:
    config = load_config(repo_root / "yamls" / f"{name}.yaml")
    OmegaConf.save(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    written, read = (OmegaConf.to_container(one, resolve=False) for one in (config, again))
    assert read == written
    assert plain(again) == plain(config)


def test_every_key_of_ours_that_is_left_out_has_the_default_of_its_signature(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    config = plain(load_config(path))
    config["trainer"] = {key: config["trainer"][key] for key in ("progress_bar", "parallelism_config")}
    streaming = section_of(StreamingDataset).keys.keys() - {"local", "remote", "split", "streams"}
    for key in streaming - {"download_timeout", "validate_hash", "keep_zip"}:
        config["train_loader"]["dataset"].pop(key, None)
    for key in section_of(AdamW).keys.keys() - {"lr", "weight_decay"}:
        config["optimizer"].pop(key, None)
    del config["loggers"]
    assert config == plain(OmegaConf.load(Path(__file__).with_name("complete.yaml")))  # type: ignore[arg-type]


def test_a_stream_that_names_no_template_has_the_datasets(demo: Path) -> None:
    config = load_config(
        demo,
        [
            "train_loader.dataset.local=null",
            "train_loader.dataset.streams={a: {local: a}, b: {local: b, template: plain}}",
            "train_loader.dataset.template=llava_llama_2",
        ],
    )
    streams = plain(config)["train_loader"]["dataset"]["streams"]
    assert {name: stream["template"] for name, stream in streams.items()} == {"a": None, "b": "plain"}
    assert streams["a"]["loss_weight"] == 1.0


def test_a_section_that_is_another_ones_is_completed_there(demo: Path) -> None:
    settings = plain(
        load_config(demo, ["variables.jitter={strength: 0.1}", "algorithms.stain_jitter=${variables.jitter}"])
    )
    assert settings["algorithms"]["stain_jitter"]["probability"] == 0.8


@pytest.mark.parametrize(
    ("key", "template", "stream", "line"),
    [
        ("streams.b.template", "plain", "template: plian", "template: unknown name 'plian'; did you mean 'plain'?"),
        ("streams.b.template", "null", "template: plian", "template: unknown name 'plian'; did you mean 'plain'?"),
        ("template", "plian", "split: x", "template: unknown name 'plian'; did you mean 'plain'?"),
        ("streams.b.system", "plain", "system: Be brief.", "'plain' has no such setting"),
        ("template", "null", "template: llava_llama_2", "is missing, and the streams have several (plain, llava_llama"),
        ("streams.b.proportion", "plain", "proportion: x", "found the text 'x'; it must be a number or null"),
        ("streams.b.template", "plain", "template: '${x}'", "found ${x}, which can't be filled in"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_said_once(demo: Path, key: str, template: str, stream: str, line: str) -> None:
    loader = [f"train_loader.dataset.{one}" for one in ("local=null", f"template={template}")]
    streams = (
        f"train_loader.dataset.streams={{a: {{local: a, proportion: 1}}, b: {{local: b, proportion: 1, {stream}}}}}"
    )
    (problem,) = problems_of(demo, "eval_loader=null", *loader, streams.replace("proportion: 1, prop", "prop"))
    assert problem.startswith(f"train_loader.dataset.{key}: {line}")


def test_a_value_in_a_list_that_cant_be_filled_in_is_said_once(demo: Path) -> None:
    (problem,) = problems_of(demo, 'model.trainable=["${nothing}"]', "optimizer.lr={projectr: 1e-3}")
    assert problem.startswith("model.trainable[0]: found ${nothing}, which can't be filled in")


def test_a_microbatch_below_the_default_length_is_refused_too(demo: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(demo)
    del config.train_loader.dataset["max_seq_len"]
    config.eval_loader = None
    OmegaConf.save(config, tmp_path / "short.yaml")
    [problem] = problems_of(tmp_path / "short.yaml")
    assert problem.startswith(
        "train_loader.max_tokens_per_microbatch: found 2048, less than train_loader.dataset.max_seq"
    )


def test_the_seed_is_that_of_order_and_jitter_too(demo: Path) -> None:
    values = plain(load_config(demo, ["seed=5", "algorithms.stain_jitter={strength: 0.1}"]))
    assert values["train_loader"]["dataset"]["shuffle_seed"] == values["algorithms"]["stain_jitter"]["seed"] == 5
    own = plain(load_config(demo, ["seed=5", "train_loader.dataset.shuffle_seed=6"]))
    assert own["train_loader"]["dataset"]["shuffle_seed"] == 6
