"""A newcomer's trial: three files as the field has them, and a slide, become one mixture that trains."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from layout_files import write_table
from tiny_run import BARE, tiny_overrides

from composer_path.cli import main as command
from composer_path.train import main

SLIDE = "cmu_small_region"


@pytest.fixture
def folder(tmp_path: Path, repo_root: Path) -> Path:
    """A slide, pictures, and files that name them: PathGen's, Quilt-1M's with QuiltCleaner's, and messages."""
    histology = os.environ.get("COMPOSER_PATH_HISTOLOGY")
    if not histology:
        pytest.skip("set COMPOSER_PATH_HISTOLOGY to a folder with cmu_small_region.svs")
    pytest.importorskip("openslide")
    shutil.copy(Path(histology) / f"{SLIDE}.svs", tmp_path)
    pictures = sorted((repo_root / "test_data" / "imgs").glob("*.jpg"))[:8]
    assert len(pictures) == 8
    for number, picture in enumerate(pictures):
        shutil.copy(picture, tmp_path / f"{number}.jpg")
    regions = [
        {"wsi_id": SLIDE, "position": [str(96 * number), "896"], "caption": f"Field {number}.", "file_id": "0"}
        for number in range(8)
    ]
    (tmp_path / "pathgen.json").write_text(json.dumps(regions))
    chats = [
        {
            "messages": [
                {"role": "system", "content": "You are a pathologist."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which stain?"}]},
                {"role": "assistant", "content": "H&E."},
            ],
            "images": [f"{number}.jpg"],
        }
        for number in range(8)
    ]
    (tmp_path / "messages.jsonl").write_text("\n".join(map(json.dumps, chats)))
    rows = [
        {"": number, "caption": f"Tissue,\nfield {number}", "image_path": f"{number}.jpg", "subset": "quilt"}
        for number in range(8)
    ]
    write_table(tmp_path / "quilt.csv", rows)
    impaired = [{"Filename": f"{number}.jpg", "any_impairment": int(number > 5)} for number in range(8)]
    write_table(tmp_path / "predictions.csv", impaired)
    return tmp_path


def test_a_slide_messages_and_a_table_train_two_steps_as_one_mixture(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {
        "pathgen": ["pathgen.json"],
        "messages": ["messages.jsonl"],
        "quilt": ["quilt.csv", "--where", f"{folder / 'predictions.csv'}:any_impairment=0"],
    }
    records = {}
    for name, (file, *more) in given.items():
        out = tmp_path / "shards" / name
        words = ["--data", str(folder / file), "--images", str(folder), "--out", str(out), "--workers", "1", *more]
        assert command(["convert", *words]) == 0
        card = json.loads((out / "dataset.json").read_text())
        records[name] = (card["records"], card["images"], card["rejected"])
    assert records == {"pathgen": (8, 8, 0), "messages": (8, 8, 0), "quilt": (6, 6, 0)}

    streams = ", ".join(f"{name}: {{local: {tmp_path / 'shards' / name}}}" for name in given)
    overrides = [*tiny_overrides("finetune", tmp_path / "shards", tmp_path / "run"), *BARE]
    overrides += ["train_loader.dataset.local=null", f"train_loader.dataset.streams={{{streams}}}"]
    overrides += ["callbacks=null", "model.projector.weights=null", "trainer.max_duration=2ba"]
    yaml = "yamls/demo/finetune.yaml"
    assert main([str(Path(__file__).resolve().parents[2] / yaml), *overrides]) == 0
    assert "step 2/2" in capfd.readouterr().err
