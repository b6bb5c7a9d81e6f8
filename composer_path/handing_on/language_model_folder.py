"""`--as language-model`: the trained language model as transformers itself would have saved it."""

from __future__ import annotations

from pathlib import Path

from composer_path.handing_on.stock_config import dtype_word, generation_config, stock_config
from composer_path.handing_on.trained_model import whole_weights
from composer_path.records.vocabulary import save_tokenizer
from composer_path.run.export import Trained, part_of
from composer_path.run.published import publish
from composer_path.weights.folder import write_folder, write_json


def write_language_model(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write a folder that `AutoModelForCausalLM` loads: weights without their prefix, configuration, tokenizer.

    Of an exported folder it has the image token's row, of a run it hasn't: adapters fit the latter.
    """
    weights = part_of(whole_weights(found, dtype), "language_model")
    config = stock_config(found.model.language_model.config) | {"torch_dtype": dtype_word(weights)}

    def write(new: Path) -> None:
        save_tokenizer(found.tokenizer, new)
        write_json(new / "generation_config.json", generation_config(found.text, found.tokenizer))
        write_folder(new, config, weights)

    publish(folder, "language-model", write)
