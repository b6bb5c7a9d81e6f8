"""Dark 16-bit pictures that were scaled for training are scaled where the trained model is asked about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from odd_files import gray16_png
from tiny_run import BARE, load_tiny_config, run
from transformers import AutoImageProcessor

from composer_path.asking.assistant import Assistant
from composer_path.config.reading import load_config
from composer_path.conversion.convert import convert
from composer_path.images.pixels import normalize_image
from composer_path.run.export import export_checkpoint

DARK = gray16_png(np.add.outer(np.arange(32), np.arange(32)) * 60)  # to 3,720: 12 bits


def test_what_training_saw_of_a_dark_picture_is_what_its_exported_model_sees(tmp_path: Path) -> None:
    (tmp_path / "dark.png").write_bytes(DARK)
    (tmp_path / "data.json").write_text(json.dumps([{"id": n, "image": "dark.png", "caption": "Dark."} for n in "ab"]))
    convert(tmp_path / "data.json", tmp_path, tmp_path / "captions", scale_levels=True)
    once = [*BARE, "trainer.max_duration=1ba", "trainer.save_interval=1ba", "train_loader.global_batch_size=2"]
    once += ["scheduler.t_warmup=0dur", "callbacks=null"]
    trainer, _ = run(load_tiny_config("pretrain", tmp_path, tmp_path, once))
    seen = trainer.state.train_dataloader.dataset[0]["pixel_values"][0]  # type: ignore[union-attr]
    assert int(seen.max()) > 200

    config = load_config(tmp_path / "pretrain" / "config.yaml")
    assert config.train_loader.dataset.scale_levels is True
    export_checkpoint(tmp_path / "pretrain" / "checkpoints" / "latest", config, tmp_path / "exported")
    assistant = Assistant.from_pretrained(tmp_path / "exported", device="cpu")
    assert torch.equal(assistant.read_image(tmp_path / "dark.png"), seen)
    encoder = assistant.model.vision_encoder
    processor = AutoImageProcessor.from_pretrained(tmp_path / "exported")
    values = processor(tmp_path / "dark.png", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, normalize_image(seen, encoder.mean, encoder.std))
