"""vLLM serves exported folders: what its entry point `vllm.general_plugins` calls in each of its processes."""

from __future__ import annotations

ARCHITECTURE = "ComposerPathForConditionalGeneration"


def register() -> None:
    """Tell vLLM and transformers of the architecture; may be called again. Nothing else of it is imported yet."""
    from vllm import ModelRegistry

    import composer_path  # noqa: F401  # transformers then knows config, processor and model

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
