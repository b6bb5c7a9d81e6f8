"""The configuration of an exported model as transformers reads and writes it.

It knows no part of the model: transformers asks for it before torch is needed, and while the parts are being imported.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, __version__

from composer_path.hugging_face.model_config import (
    ARCHITECTURE,
    MODEL_TYPE,
    VERSION,
    VISION_TYPE,
    checked_config,
    model_config,
    vision_keywords,
)
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR, read_rope_parameters

WHERE = "a model's config.json"
DTYPE_KEY = "dtype" if TRANSFORMERS_MAJOR >= 5 else "torch_dtype"


class ComposerPathVisionConfig(PretrainedConfig):
    """Keywords of `untrained_vision_encoder`, as attributes."""

    model_type = VISION_TYPE

    def __init__(self, **keywords: Any) -> None:
        keywords.pop("model_type", None)
        self.keywords = deepcopy(keywords)
        super().__init__()
        for key, value in self.keywords.items():
            setattr(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        """These keywords, and the type."""
        return {"model_type": VISION_TYPE, **deepcopy(self.keywords)}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing here has a default."""
        return self.to_dict()


class ComposerPathConfig(PretrainedConfig):
    """Vision encoder, projector and language model, and the token that stands for an image.

    Args:
        text_config: The language model's own configuration, or its keys with `model_type`.
        vision_config: Keywords of `untrained_vision_encoder`.
        projector_config: Keywords of `untrained_projector`.
        image_token_id: Of the token in an image's place.
        num_image_tokens: How many of them an image takes.
        max_seq_len: Tokens of the longest conversation that was trained, where generation ends.
        imports: What must be imported to have parts of one's own.
        **more: transformers' own.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": PretrainedConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_config: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        num_image_tokens: int | None = None,
        max_seq_len: int | None = None,
        imports: list[str] | None = None,
        **more: Any,
    ) -> None:
        if isinstance(text_config, dict):
            keys = deepcopy(text_config)
            text_config = CONFIG_MAPPING[keys.pop("model_type")](**keys)
            read_rope_parameters(text_config)
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = ComposerPathVisionConfig(**(vision_config or {}))
        self.text_config, self.vision_config = text_config, vision_config
        self.projector_config = deepcopy(projector_config or {})
        self.image_token_id, self.num_image_tokens = image_token_id, num_image_tokens
        self.max_seq_len, self.imports = max_seq_len, list(imports or [])
        for key in ("version", "model_type"):
            more.pop(key, None)
        dtypes = [more.pop("dtype", None), more.pop("torch_dtype", None)]
        more[DTYPE_KEY] = dtypes[0] if dtypes[0] is not None else dtypes[1]
        more.setdefault("architectures", [ARCHITECTURE])
        more["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**more)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From what a `config.json` holds.

        Raises:
            ValueError: It isn't what an export writes.
        """
        own = {key: value for key, value in config_dict.items() if not key.startswith("_")}
        return super().from_dict(checked_config(WHERE, own), **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's."""
        return self if self.text_config is None else self.text_config

    def to_dict(self) -> dict[str, Any]:
        """What stands in `config.json`, and nothing else."""
        if self.text_config is None:
            return {"model_type": MODEL_TYPE, "version": VERSION}
        dtype = getattr(self, DTYPE_KEY, None)
        said = model_config(
            vision=vision_keywords({"vision_config": self.vision_config.to_dict()}),
            projector=self.projector_config,
            text=text_keys(self.text_config),
            num_image_tokens=self.num_image_tokens,
            image_token_id=self.image_token_id,
            max_seq_len=self.max_seq_len,
            imports=self.imports,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            transformers_version=__version__,
        )
        auto_map = getattr(self, "auto_map", None)
        return said | ({"auto_map": dict(auto_map)} if auto_map else {})

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: whoever reads it may have other defaults."""
        return self.to_dict()


def text_keys(config: PretrainedConfig) -> dict[str, Any]:
    """All keys of a language model's configuration, as JSON has them."""
    return json.loads(config.to_json_string(use_diff=False))


AutoConfig.register(MODEL_TYPE, ComposerPathConfig, exist_ok=True)  # whichever of the two is imported first
