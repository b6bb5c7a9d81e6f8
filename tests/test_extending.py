"""The code of docs/extending.md, imported as it stands there, trains two steps, and is exported and asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import BARE, REPO_ROOT, Witness, convert_shards, run, tiny_overrides

from composer_path import Assistant, import_parts
from composer_path.commands.verb import run_verb
from composer_path.config.reading import load_config
from composer_path.own_parts.registry import own_classes, set_parts
from composer_path.shards.view import ShardView

PARTS = {
    "algorithms": "sometimes_darker",
    "callbacks": "loss_spike",
    "projectors": "gated_projector",
    "vision_encoders": "patch_mixer",
    "templates": "question_answer",
    "layouts": "slide_notes",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module", autouse=True)
def _none_left() -> Iterator[None]:
    yield
    set_parts(())


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """A YAML beside the code of the page."""
    text = (REPO_ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= len(PARTS) and max(len(block.splitlines()) for block in blocks) <= 30
    (tmp_path / "my_parts.py").write_text("\n\n".join(blocks))
    (tmp_path / "run.yaml").write_text((REPO_ROOT / "yamls" / "demo" / "finetune.yaml").read_text())
    return tmp_path / "run.yaml"


def two_steps(yaml: Path, shards: Path, *more: str) -> tuple[Any, Witness]:
    """Of a YAML, made tiny, with parts of one's own."""
    own = ("model.projector=", "model.vision_encoder=") if any(word.startswith("model.") for word in more) else ()
    base = [word for word in tiny_overrides("finetune", shards, yaml.parent / "out") if not word.startswith(own or "?")]
    words = [*base, *BARE, "algorithms=null", "trainer.max_duration=2ba", "imports=[./my_parts.py]"]
    if not own:
        words.append("model.projector.weights=null")
    return run(load_config(yaml, [*words, *more]))


ALL_OF_THEM = [
    "algorithms={sometimes_darker: {share: 0.5, every: 1}}",
    "callbacks.loss_spike={factor: 3.0}",
    "model.vision_encoder=null",
    "model.vision_encoder={name: patch_mixer, image_size: 32, tokens: all, kwargs: {depth: 1}}",
    "model.projector=null",
    "model.projector={type: gated_projector, kwargs: {hidden: 48}}",
    "train_loader.dataset.template={name: question_answer, question: 'Q:'}",
    "eval_loader=null",
]


def test_every_part_of_the_page_trains_and_the_model_says_what_it_needs(
    yaml: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, witness = two_steps(yaml, shards, *ALL_OF_THEM)
    for kind, name in PARTS.items():
        assert list(own_classes(kind)) == [name]  # type: ignore[arg-type]
    assert len(witness.losses) == 2 and all(loss > 0 for loss in witness.losses.values())
    assert len(witness.metrics["darker/images"]) == 2 and len(witness.metrics["loss_spike/ratio"]) == 2
    model = trainer.state.model
    names = {type(part).__name__.removeprefix("FSDP") for part in model.modules()}
    assert {"GatedProjector", "PatchMixer"} <= names

    folder = yaml.parent / "out" / "finetune" / "model"
    set_parts(())
    code = run_verb("ask", [str(folder), "What is it?", "--max-new-tokens", "2"])
    error = capsys.readouterr().err
    assert code == 2 and "needs code of one's own from 'my_parts.py'" in error and "--import" in error
    assert not own_classes("projectors")  # reading a folder has imported nothing
    import_parts([str(yaml.parent / "my_parts.py")])
    assistant = Assistant.from_pretrained(folder)
    assert assistant.text.template.to_json() == {"name": "question_answer", "question": "Q:"}
    image = assistant.read_image(next((REPO_ROOT / "test_data" / "imgs").glob("*.jpg")))
    assert isinstance(assistant.answer([("human", "What is it?")], [image], max_new_tokens=2), str)
    assert torch.isfinite(next(assistant.model.parameters())).all()


def test_the_layout_of_the_page_is_converted_by_its_name_only_and_says_which_rows_it_cant_read(
    yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = REPO_ROOT / "test_data" / "imgs"
    names = sorted(path.name for path in images.glob("*.jpg"))[:3]
    rows = [{"id": str(n), "tile": name, "organ": "skin", "finding": f"Finding {n}."} for n, name in enumerate(names)]
    data, code = yaml.parent / "notes.jsonl", yaml.parent / "my_parts.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def convert(out: str, *more: str) -> int:
        places = ["--data", str(data), "--images", str(images), "--out", str(yaml.parent / out)]
        return run_verb("convert", [*places, "--workers", "2", *more])

    set_parts(())
    assert convert("a", "--layout", "slide_notes") == 2 and "--layout" in capsys.readouterr().err
    assert convert("b", "--import", str(code), "--layout", "slide_notes", "--engine", "spark") == 2
    assert convert("c", "--import", str(code)) == 1  # auto takes none of one's own
    assert convert("d", "--import", str(code), "--layout", "slide_notes") == 0
    records = [json.loads(line) for line in data.read_text().splitlines()]
    assert sum(shard["samples"] for shard in ShardView(yaml.parent / "d").shards) == len(records)
    data.write_text(json.dumps({**rows[0], "organ": None}) + "\n")
    capsys.readouterr()
    assert convert("e", "--import", str(code), "--layout", "slide_notes") == 1
    assert "organ" in capsys.readouterr().err


def test_code_is_recorded_and_told(yaml: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="composer_path"):
        two_steps(yaml, shards, "callbacks.loss_spike={factor: 3.0}")
    assert re.search(r"imports\.my_parts\.py: code of one's own, hash \w+: .*callbacks loss_spike", caplog.text)
    kept = (yaml.parent / "out" / "finetune" / "config.yaml").read_text()
    assert f"- {yaml.parent / 'my_parts.py'}" in kept


def test_more_parts_by_name_train(yaml: Path, shards: Path) -> None:
    (yaml.parent / "my_parts.py").write_text(MORE)
    _, witness = two_steps(
        yaml,
        shards,
        "optimizer=null",
        "scheduler=null",
        "optimizer={name: plain_descent, lr: 1.0e-3}",
        "scheduler={name: halved, after: 1}",
        "loggers.noted={path: seen}",
        "train_metrics={worst_token: {}}",
    )
    assert witness.metrics["metrics/train/worst_token"][0] > 0
    seen = (yaml.parent / "out" / "finetune" / "seen").read_text().splitlines()
    assert {"0", "1"} <= set(seen) and {"optimizer.name", "trainer.max_duration"} <= set(seen)  # steps, settings


MORE = """
from pathlib import Path

import torch
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from torch.optim import Optimizer
from torchmetrics import Metric


class PlainDescent(Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


class Halved(ComposerScheduler):
    def __init__(self, after: int):
        self.after = after

    def __call__(self, state, ssr=1.0):
        return 0.5 if state.timestamp.batch.value >= self.after else 1.0


class Noted(LoggerDestination):
    is_run_object = True

    def __init__(self, path: str, *, run_folder):
        self.file = Path(run_folder, path)

    def log_hyperparameters(self, hyperparameters):
        for name in hyperparameters:
            self.write(name)

    def log_metrics(self, metrics, step=None):
        if "loss/train/total" in metrics:
            self.write(step)

    def write(self, what):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(f"{what}\\n")


class WorstToken(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("worst", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, losses, batch):
        self.worst = torch.maximum(self.worst, losses.max()) if len(losses) else self.worst

    def compute(self):
        return self.worst
"""


def test_a_run_goes_on_with_edited_code_and_says_so_and_is_exported_only_with_the_code_given(
    yaml: Path, shards: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    saved = [*ALL_OF_THEM, "trainer.save_interval=1ba", "trainer.autoresume=true"]
    two_steps(yaml, shards, *saved, "trainer.max_duration=1ba")
    code = yaml.parent / "my_parts.py"
    code.write_text(code.read_text() + "\n# mended\n")
    with caplog.at_level("INFO", logger="composer_path"):
        trainer, witness = two_steps(yaml, shards, *saved)
    assert list(witness.losses) == [1] and re.search(
        r"from step 1 on: imports\.my_parts\.py: '\w+' before", caplog.text
    )

    set_parts(())
    run_folder, out = yaml.parent / "out" / "finetune", yaml.parent / "exported"
    assert run_verb("export", [str(run_folder), str(out)]) == 2
    assert "my_parts.py' is not to be run here" in capsys.readouterr().err and not out.exists()
    assert run_verb("export", [str(run_folder), str(out), "--import", str(code)]) == 0
    exported = Assistant.from_pretrained(out).model.state_dict()
    trained = {name.removeprefix("model."): value for name, value in trainer.state.model.state_dict().items()}
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in trained.items()}
    assert any("projector" in name for name in whole)
    for name, value in whole.items():  # all rows but the image token's
        found = exported[name][: len(value)] if value.ndim else exported[name]
        assert torch.equal(found, value.to(found.dtype)), name
