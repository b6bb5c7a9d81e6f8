"""The demo's trained model in a folder: what harnesses are tried on, whose answers differ from question to question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parent.parent
IMAGES = REPO_ROOT / "test_data" / "imgs"
HELDOUT = REPO_ROOT / "test_data" / "heldout.json"


def demo_run(work: Path) -> Path:
    """The folder of `make demo`: that of COMPOSER_PATH_DEMO, or runs/demo, or made here in about ten minutes."""
    for place in (os.environ.get("COMPOSER_PATH_DEMO"), REPO_ROOT / "runs" / "demo"):
        if place and (Path(place) / "finetune").is_dir():
            return Path(place)
    data = {"captions": "captions", "train": "data", "heldout_captions": "heldout_captions", "heldout": "heldout"}
    python = [sys.executable, "-m"]
    variables = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    (work / "test_data").parent.mkdir(parents=True, exist_ok=True)
    for name in ("test_data", "yamls", "train.py"):
        (work / name).symlink_to(REPO_ROOT / name)
    for name, file in data.items():
        parts = ["--data", f"test_data/{file}.json", "--images", "test_data/imgs", "--out", f"runs/demo/shards/{name}"]
        subprocess.run([*python, "composer_path.cli", "convert", *parts], cwd=work, env=variables, check=True)
    for stage in ("pretrain", "finetune"):
        command = [*python, "composer.cli.launcher", "train.py", f"yamls/demo/{stage}.yaml"]
        subprocess.run(command, cwd=work, env=variables, check=True)
    return work / "runs" / "demo"


def exported(run: Path, folder: Path, *more: str) -> Path:
    """What `composer-path export` makes of the run's finetuned model, in a process of its own."""
    if not folder.exists():
        command = [sys.executable, "-m", "composer_path.cli", "export", str(run / "finetune"), str(folder), *more]
        variables = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
        subprocess.run(command, cwd=run.parent.parent, env=variables, check=True)
    return folder


@dataclass(frozen=True)
class Question:
    """What is asked: texts in turn, the user's first, and pictures before the first."""

    texts: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """In OpenAI's form, with the pictures' files as addresses."""
        roles = ("user", "assistant")
        told: list[dict[str, Any]] = [
            {"role": roles[turn % 2], "content": [{"type": "text", "text": text}]}
            for turn, text in enumerate(self.texts)
        ]
        told[0]["content"] = [
            *({"type": "image_url", "image_url": {"url": str(file)}} for file in self.files),
            *told[0]["content"],
        ]
        return told


def questions() -> list[Question]:
    """34 of the held-out records: one picture, two, none; one turn and several."""
    wanted = {"description": 6, "pair_tissue": 4, "pair_nuclei": 4, "dialogue": 6, "stain": 3, "tissue": 3, "letter": 4}
    asked = [Question(("Is this tile mostly tissue or mostly background?",), ())]
    for record in json.loads(HELDOUT.read_text(encoding="utf-8")):
        kind = record["meta"]["kind"]
        if wanted.get(kind, 0) > 0:
            wanted[kind] -= 1
            names = record["image"] if isinstance(record["image"], list) else [record["image"]]
            texts = [turn["value"] for turn in record["conversations"]]
            first = texts[0].removeprefix("<image>\n" * len(names))
            upto = 1 if kind != "dialogue" else 1 + 2 * (wanted[kind] % 3)
            asked.append(Question((first, *texts[1:upto]), tuple(IMAGES / name for name in names)))
    return asked
