"""A run whose tokenizer has more ids than the language model has embeddings trains, is exported and answers."""

from __future__ import annotations

from pathlib import Path

from tiny_run import BARE, convert_shards, load_tiny_config, run

from composer_path.run.export import export_checkpoint
from composer_path.weights.model_folder import PathMLLM

LONGER = [
    "model.language_model.config.vocab_size=31990",
    "model.language_model.resize_embeddings=true",
    "model.projector.weights=null",
    *BARE,
    "trainer.max_duration=2ba",
    "trainer.save_interval=2ba",
]


def test_added_rows_are_trained_exported_and_asked(tmp_path: Path) -> None:
    config = load_tiny_config("finetune", convert_shards(tmp_path / "shards"), tmp_path, LONGER)
    trainer, witness = run(config)
    assert sorted(witness.losses) == [0, 1]
    trained = trainer.state.model.model.language_model.get_input_embeddings().weight
    assert trained.shape[0] == 32000
    model = export_checkpoint(tmp_path / "finetune" / "checkpoints" / "latest", config, tmp_path / "exported")
    assert model.num_embeddings() == 32000
    read = PathMLLM.from_pretrained(tmp_path / "exported")
    # A folder's vocabulary has a token for images besides.
    assert read.num_embeddings() == 32001 == read.language_model.config.vocab_size
