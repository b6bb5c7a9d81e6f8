"""composer_path: train and finetune pathology vision-language models on MosaicML Composer and Streaming.

The public names, each imported when it is first asked for: importing this package takes no time. Training is
`from composer_path.train import train`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_path.asking.assistant import Assistant
    from composer_path.batches.dataset import ConversationDataset
    from composer_path.config.reading import load_config
    from composer_path.conversion.convert import convert
    from composer_path.images.pixels import load_image, normalize_image
    from composer_path.models.composer_model import ComposerPathMLLM
    from composer_path.records.conversation import Conversation
    from composer_path.records.rules import ImageError, RecordError
    from composer_path.records.tokenize import (
        IGNORE_INDEX,
        IMAGE_TOKEN_ID,
        TokenizedConversation,
        tokenize_conversation,
        tokenize_prompt,
    )
    from composer_path.weights.language_folder import build_language_model
    from composer_path.weights.model_folder import PathMLLM
    from composer_path.weights.projector_file import build_projector
    from composer_path.weights.reference import load_reference_model, save_reference_model
    from composer_path.weights.tensor_file import read_tensor_file
    from composer_path.weights.vision_file import build_vision_encoder

__version__ = "0.1.0"

_NAMES_OF = {
    "asking.assistant": ("Assistant",),
    "batches.dataset": ("ConversationDataset",),
    "config.reading": ("load_config",),
    "conversion.convert": ("convert",),
    "images.pixels": ("load_image", "normalize_image"),
    "models.composer_model": ("ComposerPathMLLM",),
    "records.conversation": ("Conversation",),
    "records.rules": ("ImageError", "RecordError"),
    "records.tokenize": (
        "IGNORE_INDEX",
        "IMAGE_TOKEN_ID",
        "TokenizedConversation",
        "tokenize_conversation",
        "tokenize_prompt",
    ),
    "weights.language_folder": ("build_language_model",),
    "weights.model_folder": ("PathMLLM",),
    "weights.projector_file": ("build_projector",),
    "weights.reference": ("load_reference_model", "save_reference_model"),
    "weights.tensor_file": ("read_tensor_file",),
    "weights.vision_file": ("build_vision_encoder",),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_ID",
    "Assistant",
    "ComposerPathMLLM",
    "Conversation",
    "ConversationDataset",
    "ImageError",
    "PathMLLM",
    "RecordError",
    "TokenizedConversation",
    "build_language_model",
    "build_projector",
    "build_vision_encoder",
    "convert",
    "load_config",
    "load_image",
    "load_reference_model",
    "normalize_image",
    "read_tensor_file",
    "save_reference_model",
    "tokenize_conversation",
    "tokenize_prompt",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
