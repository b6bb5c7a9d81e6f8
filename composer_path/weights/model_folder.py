"""The whole model as a folder of our own: `PathMLLM` with the two methods that write it and read it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import __version__

from composer_path.hugging_face.configuration import text_keys
from composer_path.hugging_face.model_config import MODEL_TYPE, checked_config, model_config, vision_keywords
from composer_path.models import path_mllm
from composer_path.models.attention import AttentionBackend
from composer_path.models.language_model import untrained_language_model
from composer_path.models.parameters import empty_parameters
from composer_path.models.projector import untrained_projector
from composer_path.models.vision_encoder import untrained_vision_encoder
from composer_path.models.vocabulary_rows import name_of, tied_names
from composer_path.own_parts.registry import check_sources, sources_of
from composer_path.storage.json_object import read_json_object
from composer_path.weights.folder import write_folder
from composer_path.weights.tensor_file import WeightsError, check_tensors, read_tensor_folder, widest_float


def is_model_folder(folder: Path) -> bool:
    """Whether a folder's `config.json` is one that `PathMLLM.save_pretrained` wrote."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


class PathMLLM(path_mllm.PathMLLM):
    """The model as users get it and runs train it: the architecture, and its way to and from a folder."""

    image_token_id: int | None = None  # of the folder it was read from
    max_seq_len: int | None = None  # likewise

    def config(
        self,
        image_token_id: int | None = None,
        max_seq_len: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Keywords that rebuild the architecture, as written to `config.json`.

        Args:
            image_token_id: Of the token that stands for an image; by default the one that the model was read with.
            max_seq_len: Tokens of the longest conversation that was trained; likewise.
            weights: The model's, where they are others than its own: of other rows or another dtype.
        """
        vision, projector = self.vision_encoder.config, self.projector.config
        text = text_keys(self.language_model.config)
        weights = self.state_dict() if weights is None else weights
        embedding = weights.get(self.embedding_name())
        if embedding is not None:
            text["vocab_size"] = len(embedding)
        dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
        return model_config(
            vision=vision,
            projector=projector,
            text=text,
            num_image_tokens=self.num_image_tokens(),
            image_token_id=self.image_token_id if image_token_id is None else image_token_id,
            max_seq_len=self.max_seq_len if max_seq_len is None else max_seq_len,
            imports=sources_of(vision_encoders=vision["name"], projectors=projector.get("type")),
            dtype=str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None,
            transformers_version=__version__,
        )

    def embedding_name(self) -> str:
        """The name of the language model's embedding."""
        embedding: Any = self.language_model.get_input_embeddings()
        return f"language_model.{name_of(self.language_model, embedding)}.weight"

    def tied_names(self) -> tuple[str, str] | None:
        """The names of the language model's head and embedding where they are one tensor, which is written once."""
        tied = tied_names(self.language_model)
        return tied and (f"language_model.{tied[0]}", f"language_model.{tied[1]}")

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: str = "5GB",
        image_token_id: int | None = None,
        max_seq_len: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a folder of safetensors shards and `config.json` that `from_pretrained` reads; tied weights once.

        Args:
            folder: Made if it isn't there; `config.json` is written last, so a folder that has one is complete.
            state_dict: The gathered weights where this module is sharded; its own by default.
            dtype: Of the written weights; as they are by default.
            max_shard_size: Of one safetensors file.
            image_token_id: Of the token that stands for an image; by default the one that the model was read with.
            max_seq_len: Tokens of the longest conversation that was trained; likewise.
            metadata: Further texts that stand in each safetensors file.
        """
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        if tied := self.tied_names():
            tensors.pop(tied[0], None)
        if dtype is not None:
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        config = self.config(image_token_id, max_seq_len, tensors)
        write_folder(Path(folder), config, tensors, max_shard_size, metadata)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, attention: AttentionBackend = "auto", dtype: torch.dtype | None = None
    ) -> PathMLLM:
        """Load a folder written by `save_pretrained`.

        Args:
            folder: With `config.json` and safetensors.
            attention: Of forward passes, see `composer_path.models.attention.resolve_attention`.
            dtype: Of the weights; as written by default.

        Raises:
            ValueError: Not such a folder, or weights that are missing, left over or of other shapes, all listed.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise ValueError(f"no config.json in '{folder}'; it must be a folder written by export or save_pretrained")
        config = checked_config(f"'{file}'", read_json_object(file))
        check_sources(str(file), config)
        try:
            with empty_parameters():
                model = cls(
                    untrained_vision_encoder(**vision_keywords(config)),
                    untrained_projector(**config["projector_config"]),
                    untrained_language_model(config["text_config"], attention=attention),
                )
        except (KeyError, TypeError, AttributeError) as error:
            fix = "export the model again"
            raise ValueError(
                f"'{file}': must be as export wrote it; found {type(error).__name__}: {error}; {fix}"
            ) from None
        said, has = config.get("num_image_tokens"), model.num_image_tokens()
        if said is not None and said != has:
            fix = "export the model again"
            raise ValueError(f"'{file}': num_image_tokens must be the model's {has}; found {said}; {fix}")
        model.image_token_id, model.max_seq_len = config["image_token_id"], config.get("max_seq_len")
        return model.filled(str(folder), read_tensor_folder(folder), dtype)

    def filled(self, source: str, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> PathMLLM:
        """This model, built empty, with the weights of `source` in place and ready to be asked.

        Raises:
            WeightsError: They don't fit (all differences listed), or aren't numbers that a model is computed with.
        """
        if (tied := self.tied_names()) and tied[1] in tensors:
            tensors = {tied[0]: tensors[tied[1]]} | tensors
            if not torch.equal(tensors[tied[0]], tensors[tied[1]]):
                found = f"tie_word_embeddings is true, but {tied[0]} differs from {tied[1]}"
                raise WeightsError(f"weights: '{source}' doesn't fit its config.json. {found}; export the model again")
        own = self.state_dict()
        check_tensors(source, own, tensors)
        floats = {key: tensor for key, tensor in tensors.items() if own[key].is_floating_point()}
        for module in {key.partition(".")[0] for key in floats}:  # between two of them vectors are converted
            of_module = {key: tensor for key, tensor in floats.items() if key.startswith(f"{module}.")}
            held = widest_float(source, of_module)
            tensors |= {key: tensor.to(dtype or held) for key, tensor in of_module.items()}
        self.load_state_dict(tensors, assign=True)
        self.language_model.tie_weights()
        return self.eval()
