"""Vision encoder, projector, language model, and the two classes that put them together."""

from composer_path.models.composer_model import ComposerPathMLLM
from composer_path.models.path_mllm import PathMLLM

__all__ = ["ComposerPathMLLM", "PathMLLM"]
