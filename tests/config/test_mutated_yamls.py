"""Whatever a YAML or an override says, it is accepted, or refused in one `ConfigError`; never anything else."""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from yaml_mutations import mutate, pairs, places, value_of, written

from composer_path.config.files import check_files
from composer_path.config.reading import ConfigError, load_config, plain

SECONDS = 30  # of one YAML; they take 0.1


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    def expired(*_: Any) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of the demo, as far as their indexes tell, so that what is behind the YAML's check is reached."""
    root = tmp_path_factory.mktemp("shards")
    for name in ("captions", "train", "heldout", "heldout_captions"):
        (root / name).mkdir()
        (root / name / "index.json").write_text(json.dumps({"shards": [{"samples": 24}], "version": 2}))
    return root


def mutated(yamls: list[Path], seed: int) -> tuple[str, list[str], list[str]]:
    """A YAML with something changed, overrides, and what was done to which file."""
    chosen = random.Random(seed)
    path = chosen.choice(yamls)
    tree = pairs(yaml.safe_load(path.read_text(encoding="utf-8")))
    done = [path.name]
    words = []
    if chosen.random() < 0.3:
        for _ in range(chosen.choice((1, 1, 2))):
            where = chosen.choice(list(places(tree)))[2]
            words.append(f"{where}={value_of(chosen, where).text}")
    else:
        for _ in range(chosen.choice((1, 1, 1, 2, 4))):
            if tree.items:
                done.append(mutate(tree, chosen))
    return written(tree), words, [*done, *(word[:200] for word in words)]


def outcome(text: str, words: list[str], shards: Path, folder: Path) -> str:
    """What comes of it: "accepted", "refused" or "files"; any other exception is the failure."""
    (folder / "mutated.yaml").write_text(text, encoding="utf-8")
    try:
        config = load_config(folder / "mutated.yaml", [f"variables.shards={shards}", *words])
    except ConfigError as error:
        assert error.problems and all(line.isprintable() and len(line) < 1000 for line in error.problems)
        return "refused"
    problems = check_files(plain(config))
    assert all(isinstance(line, str) and line for line in problems)
    return "files" if problems else "accepted"


def run(repo_root: Path, shards: Path, folder: Path, seeds: range) -> dict[str, int]:
    yamls = sorted((repo_root / "yamls").rglob("*.yaml"))
    assert len(yamls) == 4
    counts = {"accepted": 0, "files": 0, "refused": 0}
    failures = []
    for seed in seeds:
        text, words, done = mutated(yamls, seed)
        try:
            with bounded(SECONDS):
                counts[outcome(text, words, shards, folder)] += 1
        except Exception:
            failures.append(f"seed {seed}, {done}: {traceback.format_exc(limit=-3)}")
    assert failures == []
    return counts


def test_150_mutated_yamls_are_accepted_or_one_config_error(repo_root: Path, shards: Path, tmp_path: Path) -> None:
    counts = run(repo_root, shards, tmp_path, range(150))
    assert min(counts.values()) > 0, counts


@pytest.mark.slow
def test_1000_mutated_yamls_are_accepted_or_one_config_error(repo_root: Path, shards: Path, tmp_path: Path) -> None:
    counts = run(repo_root, shards, tmp_path, range(1000, 2000))
    assert sum(counts.values()) == 1000 and min(counts.values()) > 0, counts


LLAMA = (
    "model.language_model.config={model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 8, %s}"
)
# What an earlier version accepted, and built, or died of with a traceback.
REFUSED = [
    ("seed=99999999999999999999", "seed: found 99999999999999999999; it must be at most"),
    ("train_loader.dataset.shuffle_seed=99999999999999999999", "shuffle_seed: found 99999999999999999999"),
    ("train_loader.global_batch_size=100000000000", "global_batch_size: found 100000000000; it must be at most"),
    ("train_loader.max_tokens_per_microbatch=1000000000000000000000", "it must be at most 9,223,372,036,854,775,807"),
    ("train_loader.num_workers=100000000", "train_loader.num_workers: found 100000000; it must be at most 1,000"),
    ("trainer.dist_timeout=1e300", "trainer.dist_timeout: found 1e+300; it must be above 0 and at most 1e9"),
    ("trainer.max_duration=99999999999999999999999ep", "found 99999999999999999999999ep; it must be below"),
    ("trainer.run_name=" + "a" * 300, "trainer.run_name: found 'aaa"),
    ("trainer.run_name='a{b}'", "trainer.run_name: found 'a{b}'"),
    ("model.vision_encoder.std=[0,0,0]", "model.vision_encoder.std: found 0; it must be between 0.001 and 10"),
    ("model.vision_encoder.std=[-1,1,1]", "model.vision_encoder.std: found -1; it must be between"),
    ("model.vision_encoder.mean=[1e30,0,0]", "model.vision_encoder.mean: found 1e+30; it must be between 0 and 1"),
    ("model.trainable=[projector, projector]", "model.trainable: found projector twice; name each once"),
    ("model.projector.mlp.depth=100000000", "model.projector.mlp.depth: found 100000000; it must be at most 100"),
    ("callbacks.speed_report.window_size=0", "window_size: found 0; it must be at least 1"),
    ("train_loader.dataset.template={name: llava_llama_2, system: 5}", "template.system: found 5; it must be text"),
    ("train_loader.dataset.template={name: [1]}", "template: unknown name"),
    (LLAMA.replace("64", "30").replace("8", "7") % "vocab_size: 99", "hidden"),
    (LLAMA % "num_key_value_heads: 3", "must be a multiple of num_key_value_heads, found 8 and 3"),
    (LLAMA % "intermediate_size: 0", "intermediate_size must be a whole number from 1"),
    (LLAMA.replace(" 2,", " 1000000,") % "vocab_size: 99", "num_hidden_layers must be a whole number from 1 to 1,000"),
    ("model.language_model.config={model_type: lightglue}", "model_type must be a causal language model's"),
    (LLAMA.replace("llama", "[llama]") % "vocab_size: 9", "model_type must be one that transformers knows"),
    ("tokenizer.path=\"a\\u0000b\"", "tokenizer.path: found the text 'a\\x00b'; it must be text without control"),
    ("save_root=\"\\ud800\"", "while parsing a quoted scalar"),
    ("trainer=[1]", "override 'trainer=[1]': can't be applied"),
    ("variables=" + "[" * 400 + "]" * 400, "is nested more than 32 levels deep"),
    ("variables.a=!!python/object/apply:os.system [true]", "found the tag !!python/object/apply:os.system"),
    ("variables.a=!!timestamp x", "found the tag !!timestamp"),
    ("variables.a=&a [*a]", "found the alias *a inside of what it stands for"),
    ("variables.a=" + "9" * 5000, "can't be applied: Exceeds the limit"),
    ("algorithms=${trainer}", "algorithms"),
    ("variables={a: '${variables}'}", "variables"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line"), REFUSED, ids=[override[:60] for override, _ in REFUSED])
def test_it_is_refused_before_anything_is_built(demo: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught, bounded(SECONDS):
        load_config(demo, [override])
    assert any(line in problem for problem in caught.value.problems), caught.value.problems


UNBUILT = [
    ("model.vision_encoder.kwargs={embed_dim: 30, num_heads: 7}", "dim should be divisible by num_heads"),
    ("model.vision_encoder.kwargs={depth: -1}", "model: can't be built of these sizes: RuntimeError"),
    ("model.vision_encoder.kwargs={act_layer: nope}", "act_layer must be one of timm.layers or torch.nn, found 'nope'"),
    ("model.vision_encoder.mean=[0.5,0.5]", "vision_encoder.mean: must be three numbers"),
    ("model.projector.pooler.num_heads=7", "projector.pooler: dim must be divisible by num_heads"),
    ("model.projector.mlp.depth=0", "projector.mlp: depth 0 (identity) can't change the width"),
    (LLAMA % "vocab_size: 32000, hidden_act: nope", "can't be built of this configuration: KeyError: 'nope'"),
    ("trainer.load_path=/nope", "trainer.load_path: found no '/nope'"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line"), UNBUILT)
def test_what_cant_be_built_is_seen_with_the_files(demo: Path, shards: Path, override: str, line: str) -> None:
    config = load_config(demo, [f"variables.shards={shards}", override])
    [problem] = check_files(plain(config))
    assert line in problem


def test_a_yaml_of_tags_aliases_or_a_single_value_is_one_line(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{there}: &{there} [{', '.join([f'*{here}'] * 10)}]\n" for here, there in zip("abcd", "bcde", strict=True)
    )
    for text, line in [
        ("seed: !!python/name:os.system\n", "found the tag !!python/name:os.system; only plain values are read"),
        ("a: {b: &x {c: *x}}\n", "found the alias *x inside of what it stands for"),
        (bomb, "holds more than 10,000 values"),
        ("a: !!bool 5\n", "found the tag !!bool"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested more than 32 levels deep"),
        ("5\n", "it is a single value"),
        ("a: \x07\n", "can't be read as YAML"),
        ("a: '\x1b[31m'\n", "can't be read as YAML"),
        ("a: 1\n---\nb: 1\n", "can't be read as YAML"),
        ("a: " + "9" * 5000, "can't be read as YAML"),
    ]:  # fmt: skip
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught, bounded(SECONDS):
            load_config(tmp_path / "x.yaml")
        assert len(caught.value.problems) == 1 and line in caught.value.problems[0]
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match="can't be read as YAML"):
        load_config(tmp_path / "x.yaml")
