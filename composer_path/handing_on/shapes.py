"""The shapes in which a trained model is handed on, by the words of `export --as`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer_path.handing_on.language_model_folder import write_language_model
from composer_path.handing_on.llava_hf import write_llava_hf
from composer_path.handing_on.onnx_file import write_onnx
from composer_path.handing_on.peft_folder import write_peft
from composer_path.handing_on.projector_folder import write_projector_folder
from composer_path.handing_on.reference_folder import write_reference
from composer_path.run.export import Trained

Writer = Callable[[Path, Trained, str | None], None]
SHAPES: dict[str, Writer] = {
    "llava-hf": write_llava_hf,
    "reference": write_reference,
    "language-model": write_language_model,
    "projector": write_projector_folder,
    "onnx": write_onnx,
    "peft": write_peft,
}
