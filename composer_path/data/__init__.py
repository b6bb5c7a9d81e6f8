"""From records to batches: conversations, images, prompts, tokens, shards, loader.

The streaming parts (`dataset`, `loader`) are imported from their own files: they take seconds to load. So do those
below that need torch, so each name is imported when it is first used; a process that only converts needs none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_path.data.conversation import Conversation, RecordError
    from composer_path.data.image import ImageError, load_image, normalize_image
    from composer_path.data.tokenize import (
        IGNORE_INDEX,
        IMAGE_TOKEN_ID,
        TokenizedConversation,
        tokenize_conversation,
        tokenize_prompt,
    )

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_ID",
    "Conversation",
    "ImageError",
    "RecordError",
    "TokenizedConversation",
    "load_image",
    "normalize_image",
    "tokenize_conversation",
    "tokenize_prompt",
]

_FILES = {
    "conversation": ("Conversation", "RecordError"),
    "image": ("ImageError", "load_image", "normalize_image"),
    "tokenize": (
        "IGNORE_INDEX",
        "IMAGE_TOKEN_ID",
        "TokenizedConversation",
        "tokenize_conversation",
        "tokenize_prompt",
    ),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
