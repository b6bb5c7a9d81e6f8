"""What is missing on the disk is said before a run starts, with key and remedy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from composer_path.config.files import check_files, samples_left_out
from composer_path.config.reading import load_config, plain
from composer_path.train import main

REPO_ROOT = Path(__file__).resolve().parents[2]
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_index(folder: Path, samples: int, **more: Any) -> str:
    """A set of so many samples, as far as its index tells."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").write_text(json.dumps({"shards": [{"samples": samples}], "version": 2, **more}))
    return str(folder)


@pytest.fixture
def settings(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration whose files are all there."""
    monkeypatch.chdir(repo_root)
    (tmp_path / "projector.safetensors").touch()
    config = load_config(
        repo_root / "yamls" / "demo" / "finetune.yaml",
        [
            f"save_root={tmp_path / 'runs'}",
            f"model.projector.weights={tmp_path / 'projector.safetensors'}",
            f"train_loader.dataset.local={write_index(tmp_path / 'train', 24)}",
            f"eval_loader.dataset={{local: {Path(write_index(tmp_path / 'heldout', 8)).parent}, split: heldout}}",
            "trainer.autoresume=false",
        ],
    )
    return plain(config)


def streams(**sets: dict[str, Any]) -> dict[str, Any]:
    """Streams as a complete configuration has them."""
    rest = {"remote": None, "split": None, "template": "plain", "proportion": None, "repeat": None, "choose": None}
    return {name: rest | keywords for name, keywords in sets.items()}


def test_a_run_whose_files_are_there_may_start(settings: dict[str, Any]) -> None:
    assert check_files(settings) == []


def test_all_that_is_missing_is_listed_at_once_with_its_key(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["tokenizer"]["path"] = "nowhere"
    settings["model"]["vision_encoder"]["weights"] = "vision.pt"
    settings["model"]["projector"]["weights"] = "projector.pt"
    settings["model"]["language_model"]["path"] = "llama"
    settings["train_loader"]["dataset"]["local"] = str(tmp_path / "other")
    settings["eval_loader"]["dataset"]["split"] = "other"
    keys = [problem.split(":")[0] for problem in check_files(settings)]
    assert sorted(keys) == [
        "eval_loader.dataset.local",
        "model.language_model.path",
        "model.projector.weights",
        "model.vision_encoder.weights",
        "tokenizer.path",
        "train_loader.dataset.local",
    ]


def test_shards_that_are_fetched_need_not_lie_here(settings: dict[str, Any]) -> None:
    settings["train_loader"]["dataset"] |= {"local": "cache", "remote": "s3://bucket/train"}
    assert check_files(settings) == []
    settings["train_loader"]["dataset"] |= {"local": "s3://bucket/train", "remote": None}
    assert check_files(settings) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [{}]}', '{"shards": [{"samples": "24"}]}'])
def test_an_index_that_is_none_is_left_to_its_reader_which_names_it(settings: dict[str, Any], content: str) -> None:
    Path(settings["train_loader"]["dataset"]["local"], "index.json").write_text(content)
    assert check_files(settings) == []


def test_each_stream_of_a_mixture_is_looked_up(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train_loader"]["dataset"]["streams"] = streams(
        here={"local": str(tmp_path / "train")}, lost={"local": "lost"}, far={"local": "c", "remote": "r"}
    )
    [problem] = check_files(settings)
    assert problem.startswith("train_loader.dataset.streams.lost.local: found no index.json in 'lost'")


def test_only_rank_0_looks_for_weights(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["model"]["projector"]["weights"] = "only-on-the-first-node.safetensors"
    assert len(check_files(settings)) == 1
    monkeypatch.setenv("RANK", "8")
    assert check_files(settings) == []


def test_results_of_an_earlier_run_are_not_mixed_with_new_ones(settings: dict[str, Any]) -> None:
    checkpoints = Path(settings["save_root"], "finetune", "checkpoints")
    checkpoints.mkdir(parents=True)
    assert check_files(settings) == []
    (checkpoints / "ep1-ba20").mkdir()
    [problem] = check_files(settings)
    assert problem.startswith("trainer.run_name: found checkpoints of an earlier run")
    for way_out in ({"autoresume": True}, {"save_overwrite": True}, {"save_interval": None}):
        assert check_files(settings | {"trainer": settings["trainer"] | way_out}) == []


def test_a_missing_projector_is_null_in_stage_1_and_that_of_stage_1_in_stage_2(settings: dict[str, Any]) -> None:
    settings["model"]["projector"]["weights"] = "nowhere"
    [problem] = check_files(settings)
    assert (
        problem == "model.projector.weights: found no 'nowhere'; run stage 1 first, or give its projector.safetensors"
    )
    settings["model"]["trainable"] = ["projector"]
    [problem] = check_files(settings)
    assert problem == "model.projector.weights: found no 'nowhere'; give null to start from random weights"


def test_a_pooler_to_start_from_is_looked_for(settings: dict[str, Any]) -> None:
    settings["model"]["projector"] |= {"weights": None, "pooler_weights": "nowhere"}
    [problem] = check_files(settings)
    assert problem.startswith("model.projector.pooler_weights: found no 'nowhere'")


def test_a_tokenizer_longer_than_the_embedding_is_one_line_and_a_shorter_one_is_fine(settings: dict[str, Any]) -> None:
    settings["model"]["language_model"]["config"] = {"model_type": "llama", "vocab_size": 31990}
    [problem] = check_files(settings)
    assert problem.startswith("tokenizer.path: its ids must be below the language model's 31990 embeddings, found 10 ")
    settings["model"]["language_model"]["config"]["vocab_size"] = 32064
    assert check_files(settings) == []


def test_a_longer_tokenizer_is_taken_where_rows_may_be_added(settings: dict[str, Any]) -> None:
    settings["model"]["language_model"]["config"] = {"model_type": "llama", "vocab_size": 31990}
    settings["model"]["language_model"]["resize_embeddings"] = True
    assert check_files(settings) == []


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, r"its RoPE \(dynamic\) depends"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "factor": 4.0,
                }
            },
            r"its RoPE \(longrope\) depends on a row's longest sample beyond 64 tokens, found .* set max_seq_len",
        ),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, "has learned 64 positions|transformers 5"),
    ],
)
def test_samples_that_are_too_long_for_the_language_model_are_seen_before_it_is_built(
    settings: dict[str, Any], said: dict[str, Any], named: str
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    keys = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 64, **said}
    settings["model"]["language_model"]["config"] = keys if keys["model_type"] == "gpt2" else sizes | keys
    problems = check_files(settings)
    assert problems and all(re.search(named, problem) for problem in problems)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"tokenizer_file": "/etc/passwd"}, "must name no files, found tokenizer_file"),
        ({"fast_tokenizer_files": ["tokenizer.../../x.json"]}, "must name files inside of it"),
        ({"extra": float("nan")}, "found NaN, which is no number"),
    ],
)
def test_a_tokenizer_names_files_of_its_folder_only(
    settings: dict[str, Any], tmp_path: Path, repo_root: Path, said: dict[str, Any], named: str
) -> None:
    shutil.copytree(repo_root / "test_data" / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    settings["tokenizer"]["path"] = str(tmp_path / "tokenizer")
    [problem] = check_files(settings)
    assert named in problem and "\n" not in problem


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_tokenizer_is_one_line(settings: dict[str, Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    settings["tokenizer"]["path"] = str(tmp_path / "tokenizer")
    [problem] = check_files(settings)
    assert problem.startswith(f"tokenizer.path: '{tmp_path / 'tokenizer'}' can't be read: ") and "\n" not in problem


def test_a_chat_template_must_be_the_tokenizers(settings: dict[str, Any], tmp_path: Path, repo_root: Path) -> None:
    settings["train_loader"]["dataset"]["template"] = {"name": "chat_template", "system": "Be brief."}
    [problem] = check_files(settings)
    assert problem.startswith("train_loader.dataset.template: found no chat template in tokenizer.path")
    shutil.copytree(repo_root / "test_data" / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHAT)
    settings["tokenizer"]["path"] = str(tmp_path / "tokenizer")
    assert check_files(settings) == []
    for broken, why in (
        ("{% for", "unexpected"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__ }}", "once and in order"),
    ):
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text(broken)
        [problem] = check_files(settings)
        assert problem.startswith("train_loader.dataset.template: the tokenizer's chat template ") and why in problem


def test_a_sentencepiece_file_that_was_not_fetched_is_named(
    settings: dict[str, Any], tmp_path: Path, repo_root: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(repo_root / "test_data" / "tokenizer", folder)
    settings["tokenizer"]["path"] = str(folder)
    for content in ("version https://git-lfs.github.com/spec/v1\n", (folder / "tokenizer.model").read_bytes()[:999]):
        (folder / "tokenizer.model").write_bytes(content if isinstance(content, bytes) else content.encode())
        [problem] = check_files(settings)
        assert "tokenizer.model in it is no whole sentencepiece model" in problem


@pytest.mark.parametrize(
    ("batch", "drop_last", "ranks", "ends", "left_out"),
    [
        (64, False, 1, True, 0),
        (64, True, 1, False, 24),
        (24, True, 1, True, 0),
        (10, True, 1, True, 4),
        (10, False, 1, True, 0),
        (32, True, 2, False, 24),
        (24, True, 8, True, 0),
        (14, True, 2, True, 10),
    ],
)
def test_an_epoch_without_a_step_is_refused_and_what_is_left_out_is_counted(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    drop_last: bool,
    ranks: int,
    ends: bool,
    left_out: int,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    settings["train_loader"] |= {"global_batch_size": batch, "drop_last": drop_last}
    problems = check_files(settings)
    assert (problems == []) is ends
    assert ends or "the 24 samples of an epoch are too few (drop_last" in problems[0]
    told = list(samples_left_out(settings))
    assert (told == []) is (left_out == 0)
    assert not left_out or f"train_loader: {left_out} of an epoch's 24 samples are left out" in told[0]


def test_more_canonical_nodes_than_samples_are_refused(settings: dict[str, Any]) -> None:
    settings["train_loader"]["dataset"]["num_canonical_nodes"] = 24
    assert check_files(settings) == []
    settings["train_loader"]["dataset"]["num_canonical_nodes"] = 25
    [problem] = check_files(settings)
    assert problem == (
        "train_loader.dataset.num_canonical_nodes: found 25, and an epoch has 24 samples; give at most 24, or leave it "
        "out"
    )


@pytest.mark.parametrize(("shares", "left_out"), [({}, 4), ({"repeat": 2.0}, 0), ({"choose": 5}, 2)])
def test_samples_of_a_mixture_are_counted_by_its_shares(
    settings: dict[str, Any], tmp_path: Path, shares: dict[str, float], left_out: int
) -> None:
    large, small = write_index(tmp_path / "large", 16), write_index(tmp_path / "small", 12)
    mixture = streams(large={"local": large, **shares}, small={"local": small, **shares})
    settings["train_loader"]["dataset"]["streams"] = mixture
    settings["train_loader"] |= {"global_batch_size": 8, "drop_last": True}
    assert check_files(settings) == []
    assert [line.split()[1] for line in samples_left_out(settings)] == [str(left_out)] * bool(left_out)


def test_sets_whose_dark_pictures_were_read_in_two_ways_are_seen(settings: dict[str, Any], tmp_path: Path) -> None:
    write_index(tmp_path / "train", 24, scale_levels=True)
    assert check_files(settings) == []
    settings["train_loader"]["dataset"]["scale_levels"] = False
    [problem] = check_files(settings)
    assert problem.startswith("train_loader.dataset: scale_levels: found false, but train_loader.dataset was converted")


def test_stored_features_must_be_of_the_images_that_the_run_prepares(settings: dict[str, Any], tmp_path: Path) -> None:
    features = {"encoder": {}, "weights": "", "fit": "crop", "decoder": "pil", "pad_color": [0, 0, 0]}
    features |= {"num_tokens": 50, "dim": 96, "dtype": "bfloat16"}
    write_index(tmp_path / "train", 24, features=features)
    settings["algorithms"] = {}
    [problem] = check_files(settings)
    assert problem.startswith("train_loader.dataset.fit: found pad; the features there were made with crop")
    settings["train_loader"]["dataset"]["fit"] = "crop"
    assert check_files(settings) == []
    settings["model"]["trainable"] = ["vision_encoder", "projector"]
    [problem] = check_files(settings)
    assert problem.startswith("model.trainable: vision_encoder can't learn from train_loader")


def test_the_command_says_it_in_a_line_a_problem_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"save_root={tmp_path}", f"variables.shards={tmp_path}/none"]
    assert main([str(REPO_ROOT / "yamls" / "demo" / "finetune.yaml"), *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "Traceback" not in "".join(lines)
    assert lines[1].strip().startswith("train_loader.dataset.local: found no index.json in")
    assert lines[3].strip().startswith("model.projector.weights: found no")
