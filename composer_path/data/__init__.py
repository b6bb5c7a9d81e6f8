"""From records to batches: conversations, images, prompts, tokens, shards, loader.

The streaming parts (`dataset`, `loader`) are imported from their own files: they take seconds to load.
"""

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
