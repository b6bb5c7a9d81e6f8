"""composer_path: train and finetune pathology vision-language models on MosaicML Composer and Streaming.

The public names, each imported when it is first asked for: importing this package takes no time. Training is
`from composer_path.train import train`. Type checkers read the same names in `__init__.pyi`. transformers knows the
models from then on (`AutoModelForImageTextToText`, `AutoProcessor`, ...).
"""

from importlib import import_module
from typing import Any

from composer_path.hugging_face.registration import register

__version__ = "0.1.0"

_NAMES_OF = {
    "asking.assistant": "Assistant",
    "batches.dataset": "ConversationDataset",
    "config.reading": "load_config",
    "conversion.convert": "convert",
    "images.pixels": "ImagePreparation load_image normalize_image",
    "models.composer_model": "ComposerPathMLLM",
    "own_parts.imports": "import_parts",
    "records.conversation": "Conversation",
    "records.rules": "ImageError RecordError",
    "records.tokenize": "IGNORE_INDEX IMAGE_TOKEN_ID TextPreparation TokenizedConversation "
    "tokenize_conversation tokenize_prompt",
    "weights.language_folder": "build_language_model",
    "weights.model_folder": "PathMLLM",
    "weights.projector_file": "build_projector",
    "weights.reference": "load_reference_model save_reference_model",
    "weights.tensor_file": "read_tensor_file",
    "weights.vision_file": "build_vision_encoder",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
