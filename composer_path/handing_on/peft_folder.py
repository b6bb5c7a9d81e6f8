"""`--as peft`: LoRA's adapters apart, a folder for each module that has some, as stock peft loads them."""

from __future__ import annotations

from pathlib import Path

from composer_path.models.lora import peft_config
from composer_path.models.pattern import MODULES
from composer_path.run.export import Trained, part_of, write_adapter
from composer_path.run.published import publish


def write_peft(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write `language_model/` and `vision_encoder/`, whichever has adapters.

    Raises:
        ValueError: There are none, or a dtype is asked for: adapters are as they were trained.
    """
    if dtype is not None:
        raise ValueError(f"--dtype: adapters are written as they were trained, found {dtype}; leave it out")
    if found.trained_modules is None:
        fix = "name the run or its checkpoint, which have them apart"
        raise ValueError(f"--as peft: needs adapters, and an exported folder's are merged; {fix}")
    names = [name for name in MODULES if peft_config(getattr(found.model, name))]
    if not names:
        raise ValueError("--as peft: needs adapters, found none; the run must have model.lora")

    def write(new: Path) -> None:
        for name in names:
            write_adapter(new / name, peft_config(getattr(found.model, name)), part_of(found.weights, name))

    publish(folder, "peft", write)
