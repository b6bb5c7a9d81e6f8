"""The call that measures a GPU, where there is none: what it runs, what it keeps, and that its exit code is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from warm_process import popen

from benchmarks.gpu import __main__ as call
from benchmarks.gpu import jobs
from benchmarks.gpu.jobs import Job, run_job
from benchmarks.gpu.padded import padded_forward
from benchmarks.gpu.variants import VARIANTS, peer_recomputes, row_tokens
from benchmarks.gpu.verdict import NEEDS_CUDA
from composer_path.config.reading import load_config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pieces of work in processes that have imported torch already; their names as they start."""
    names: list[str] = []

    def start(words: list[str], **keywords: Any) -> subprocess.Popen:
        names.append(Path(words[3]).parent.name)
        return popen(words, **keywords)

    warm = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(jobs, "subprocess", warm)
    return names


def test_a_tiny_call_trains_compares_and_goes_on_where_another_ended(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "scratch"), "--stage", "2"]
    words += ["--steps", "1"]
    assert call.main([*words, "--variants", "eager,liger"]) == 0
    assert started == ["prepare", "ceilings", "stage_2_eager"]
    found = json.loads((tmp_path / "results" / "gpu.json").read_text())["jobs"]
    assert found["stage 2: liger"] == {"not_run": NEEDS_CUDA}
    assert found["ceilings"]["matmul_tflops"] > 0
    eager = found["stage 2: eager"]
    assert eager["samples_per_s"] > 0 and eager["measured_steps"] == 1 and len(eager["losses"]) == 2
    watched = eager["gradients"]["of"]
    assert {"projector.mlp.0.weight", "language_model.model.layers.1.self_attn.k_proj.weight"} <= watched.keys()
    assert all(any(one["entries"]) and one["norm"] > 0 for one in watched.values())
    assert "open, not measured" in capsys.readouterr().out
    assert call.main([*words, "--variants", "eager,padded"]) == 0
    assert started[3:] == ["stage_2_padded"]
    padded = json.loads((tmp_path / "results" / "gpu.json").read_text())["jobs"]["stage 2: padded"]
    assert padded["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert padded["errors"]["gradients"] < 1e-2  # measured 2.6e-5, and 0 on CPUs that compute in tiles


def test_the_padded_variant_computes_a_rectangle_and_the_same_losses() -> None:
    lengths, weight, seen = [3, 5], torch.randn(4, 7), []

    def language_model(inputs_embeds: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        seen.append(tuple(inputs_embeds.shape))
        return SimpleNamespace(logits=inputs_embeds @ weight)

    row, index, targets = torch.randn(8, 4), torch.tensor([1, 4, 6]), torch.tensor([2, 0, 5])
    model: Any = SimpleNamespace(
        embed_images=lambda images: images, embed_tokens=lambda *given: row, language_model=language_model
    )
    ends = torch.tensor([0, *np.cumsum(lengths)])
    ids = torch.zeros(8, dtype=torch.int64)
    losses = padded_forward(model, ids, ids, ends, 5, row, ids, index, targets)
    assert seen == [(2, 5, 4)]
    assert torch.allclose(losses, F.cross_entropy(row[index] @ weight, targets, reduction="none"))


def trained(loss: float = 10.0, key: float = 1.0) -> dict[str, Any]:
    weights = {"k_proj": {"norm": 2.0, "entries": [key, 2.0]}, "mlp": {"norm": 1.0, "entries": [0.5, 0.1]}}
    return {
        "samples_per_s": 5.0,
        "needed_tflops": 1.0,
        "losses": [loss, 9.0],
        "gradients": {"norm": 3.0, "of": weights},
        "peak_bytes": None,
    }


OTHERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "the same": (trained(), 0, ""),
    "failed": ({"failed": "OutOfMemoryError: CUDA"}, 1, "stage 1: padded: OutOfMemoryError"),
    "late": (trained() | {"failed": "took longer than 5 s"}, 1, "stage 1: padded: took longer"),
    "another loss": (trained(loss=10.2), 1, "differs from eager: loss 2.0e-02"),
    "no loss": (trained(loss=float("nan")), 1, "differs from eager: loss nan"),
    "another gradient of keys": (trained(key=-1.0), 1, "differs from eager: gradients 8.9e-01"),
    "a gradient is missing": (
        trained() | {"gradients": {"norm": 3.0, "of": {"mlp": {"norm": 1.0, "entries": [0.5, 0.1]}}}},
        1,
        "gradients nan",
    ),
    "doesn't fit": ({"not_run": "plan: rows of 0 tokens fit"}, 1, "stage 1: padded: plan"),
}
FACTS = {
    "places": {key: "/nowhere" for key in ("save_root", "shards", "language_model", "tokenizer")},
    "tokens": 180,
    "trained": 7e9,
    "frozen": 3e8,
    "standing": 111e9,
    "free": 20e9,
    "fits": {
        kind: {"per_token": 5e6 / n, "fixed": 1e9, "most_tokens": 3967 * n}
        for n, kind in enumerate(("off", "selective", "full"), 1)
    },
}
PREPARED = {"gpu": None, "tiny": True, "memory": 150e9, "peak": None, "reserved": 0.08, "vocabulary": 32000}
PREPARED["stages"] = {"1": FACTS, "2": FACTS}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, dict[str, Any]]], list[str]]:
    """Results by name in place of processes; returns what is begun."""

    def settle(reports: dict[str, dict[str, Any]]) -> list[str]:
        begun: list[str] = []

        def pretended(job: Job, scratch: Path, seconds: float, log: Path) -> dict[str, Any]:
            begun.append(job.name)
            return {"not_run": job.not_run} if job.not_run else dict(reports.get(job.name, trained()))

        monkeypatch.setattr(call, "run_job", pretended)
        return begun

    return settle


@pytest.mark.parametrize("case", OTHERS)
def test_the_exit_code_says_whether_all_variants_ran_and_agree(
    case: str, tmp_path: Path, pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report, code, message = OTHERS[case]
    begun = pretend({"prepare": PREPARED, "stage 1: padded": report})
    words = ["--tiny", "--stage", "1", "--results", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    assert call.main(words) == code
    assert message in capsys.readouterr().err
    assert begun[-2:] == ["stage 1: transformers", "stage 1: compile"]  # others run all the same
    results = json.loads((tmp_path / "gpu.json").read_text())["jobs"]
    assert ("over_padded" in results["stage 1: eager"]) == (code == 0)
    again = pretend({"stage 1: padded": report, "prepare": PREPARED})
    assert call.main(words) == code
    kept = {"ceilings", "stage 1: eager", "stage 1: transformers"}
    assert kept.isdisjoint(again) and ("stage 1: padded" in again) == bool({"failed", "not_run"} & report.keys())


def test_a_try_of_every_line_runs_them_all_again(tmp_path: Path, pretend: Any) -> None:
    words = ["--tiny", "--scratch", str(tmp_path)]
    begun = pretend({"prepare": PREPARED})
    assert call.main(words) == 0
    assert begun[-2:] == ["stage 2: compile", "cells: compile"] and len(begun) == 18
    again = pretend({"prepare": PREPARED})
    assert call.main(words) == 0 and again == begun


def test_without_its_baseline_no_variant_counts(tmp_path: Path, pretend: Any) -> None:
    pretend({"prepare": PREPARED, "stage 1: eager": {"failed": "RuntimeError"}})
    words = ["--tiny", "--stage", "1", "--results", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    assert call.main(words) == 1
    assert "nothing to compare" in json.loads((tmp_path / "gpu.json").read_text())["jobs"]["stage 1: padded"]["unequal"]


def test_what_a_cpu_can_not_run_is_forgiven_to_a_tiny_call_only(tmp_path: Path, pretend: Any) -> None:
    pretend({"prepare": PREPARED | {"tiny": False}})
    assert call.main(["--stage", "1", "--results", str(tmp_path), "--scratch", str(tmp_path / "scratch")]) == 1


def test_results_of_two_machines_are_not_mixed(
    tmp_path: Path, pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--stage", "1", "--results", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    pretend({"prepare": PREPARED})
    assert call.main(words) == 0
    pretend({"prepare": PREPARED | {"gpu": "NVIDIA H200"}})
    assert call.main(words) == 1
    assert "found results of gpu None, this is 'NVIDIA H200'" in capsys.readouterr().err


def test_a_call_whose_time_is_over_begins_nothing_more(tmp_path: Path) -> None:
    found = run_job(Job("late", {"work": "ceilings"}), tmp_path, 3.0, tmp_path / "log")
    assert found["failed"].startswith("not begun") and not (tmp_path / "jobs").exists()


def test_a_job_is_killed_when_its_time_is_over_and_keeps_what_it_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen] = []

    def start(words: list[str], **keywords: Any) -> subprocess.Popen:
        Path(words[4]).write_text('{"known": 1}')
        begun.append(subprocess.Popen(["sleep", "60"], **keywords))
        return begun[0]

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(jobs, "LEAST_SECONDS", 0)
    found = run_job(Job("slow", {"work": "ceilings"}), tmp_path, 0.2, tmp_path / "log")
    assert found["known"] == 1 and found["failed"] == "took longer than 0 s" and begun[0].returncode == -9
    assert "== slow: took longer" in (tmp_path / "log").read_text()


def test_a_job_that_raises_says_what_and_leaves_its_last_lines(tmp_path: Path, started: list[str]) -> None:
    found = run_job(Job("wrong", {"work": "nowhere"}), tmp_path, 60, tmp_path / "log")
    assert found["failed"] == "ModuleNotFoundError: No module named 'benchmarks.gpu.nowhere'"
    assert "Traceback" in (tmp_path / "log").read_text()


def test_rows_are_those_that_plan_allows_on_the_card() -> None:
    assert row_tokens(VARIANTS["eager"], PREPARED, "2") == 3840  # of 3,967, in steps of 256
    assert row_tokens(VARIANTS["selective"], PREPARED, "2") == 7680
    # 19 GB, 1.67 MB and 384 kB of logits a position, 2.5 positions a token
    assert row_tokens(VARIANTS["padded"], PREPARED, "2") == int(19e9 / (5e6 / 3 + 384e3) / 2.5) // 256 * 256
    assert not peer_recomputes(PREPARED, "2", batch=32)  # 7 k tokens of 5 MB beside 57 GB
    assert peer_recomputes(PREPARED, "2", batch=128)


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_yaml_that_can_be_trained_with(name: str, stage: str, tmp_path: Path) -> None:
    options = call.parse(["--scratch", str(tmp_path)])
    task = call.stage_task(options, PREPARED | {"gpu": "NVIDIA H200", "tiny": False}, stage, name)
    config = load_config(task["yaml"], task["overrides"])
    assert (config.execution.activation_checkpointing or "off") == VARIANTS[name].checkpointing  # YAML's off is false
    assert config.execution.fusion == (name if name in ("liger", "compile") else "off")
    assert config.train_loader.global_batch_size == {"1": 64, "2": 32}[stage]
    assert config.trainer.max_duration == "11ba"


def test_wheels_are_unpacked_for_the_call_alone(tmp_path: Path, repo_root: Path) -> None:
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought/__init__.py", "")
    python = tmp_path / "python"  # unpacks, and shows what the benchmark would see
    python.write_text(
        f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\n'
        'echo "$@"; echo "$PYTHONPATH"; ls "${PYTHONPATH##*:}"\n'
    )
    python.chmod(0o755)
    words = [str(repo_root / "benchmarks" / "gpu.sh"), "--stage", "1", "--wheels", str(tmp_path), "--tiny"]
    environment = os.environ | {"PYTHON": str(python)}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    arguments, path, content = found.stdout.splitlines()
    assert arguments == "-m benchmarks.gpu --stage 1 --tiny" and content == "brought"
    assert path.startswith(str(repo_root)) and not Path(path.rpartition(":")[2]).exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    words[4] = str(empty)
    refused = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and "must hold the wheels" in refused.stderr


def test_each_wheel_has_one_version(repo_root: Path) -> None:
    lines = (repo_root / "benchmarks" / "gpu" / "wheels.txt").read_text().splitlines()
    assert len(lines) == 31 and all(line.count("==") == 1 for line in lines) and lines == sorted(lines, key=str.lower)
    assert {"mosaicml==0.32.1", "mosaicml-streaming==0.13.0"} <= set(lines)
