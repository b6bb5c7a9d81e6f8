"""Makes transformers know this project's models without importing it: what waits until its auto classes are asked for.

`import composer_path` takes no time, and transformers takes seconds. So a finder stands before Python's own: it finds
what they find, and where that is a module of auto classes, ours are added to it once it is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from composer_path.hugging_face.model_config import ARCHITECTURE, MODEL_TYPE

CONFIG, MODEL = "ComposerPathConfig", ARCHITECTURE
ROOM = "composer_path.hugging_face"
PROCESSOR, IMAGE_PROCESSOR = "ComposerPathProcessor", "ComposerPathImageProcessor"


def register_config(module: ModuleType) -> None:
    """Let `AutoConfig` know ours; its module needs nothing of the model."""
    if config := _class_of("configuration", CONFIG):
        module.AutoConfig.register(MODEL_TYPE, config, exist_ok=True)


def register_model(module: ModuleType) -> None:
    """Let `AutoModelForImageTextToText` and its pipeline know ours, by name: its parts may be half imported now."""
    names = module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    mapping = module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    names[MODEL_TYPE] = MODEL
    mapping._reverse_config_mapping[CONFIG] = MODEL_TYPE
    mapping._config_mapping = {**mapping._config_mapping, MODEL_TYPE: CONFIG}  # not the one that all share
    mapping._modules[MODEL_TYPE] = _Room(ROOM)


def register_processor(module: ModuleType) -> None:
    """Let `AutoProcessor` know ours."""
    config, processor = _class_of("configuration", CONFIG), _class_of("processor", PROCESSOR)
    if config and processor:
        module.AutoProcessor.register(config, processor, exist_ok=True)


def register_image_processor(module: ModuleType) -> None:
    """Let `AutoImageProcessor` know ours."""
    config, processor = _class_of("configuration", CONFIG), _class_of("image_processor", IMAGE_PROCESSOR)
    if config and processor:
        module.AutoImageProcessor.register(config, slow_image_processor_class=processor, exist_ok=True)


AUTO = "transformers.models.auto."
# What is done when a module of transformers is there.
REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    f"{AUTO}configuration_auto": register_config,
    f"{AUTO}modeling_auto": register_model,
    f"{AUTO}image_processing_auto": register_image_processor,
    f"{AUTO}processing_auto": register_processor,
}


def _class_of(module: str, name: str) -> Any:
    """A class of this room; None where its module is being imported, which then registers it itself."""
    return getattr(importlib.import_module(f"{ROOM}.{module}"), name, None)


class _Room(ModuleType):
    """What transformers takes for the module with our classes: it has each when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        where = {CONFIG: "configuration", MODEL: "modeling"}.get(name)
        if where is None:
            raise AttributeError(name)
        return getattr(importlib.import_module(f"{ROOM}.{where}"), name)


class _Finder:
    """Finds modules of auto classes as the finders behind it do, and has ours added when they are executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in REGISTRATIONS:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _Executing(name, spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None


class _Executing:
    """Executes a module of auto classes, then adds ours."""

    def __init__(self, name: str, execute: Callable[[ModuleType], None]) -> None:
        self.name, self.execute = name, execute

    def __call__(self, module: ModuleType) -> None:
        self.execute(module)
        REGISTRATIONS[self.name](module)


def register() -> None:
    """Register now what transformers has imported already, and the rest when it does."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, act in REGISTRATIONS.items():
        if (module := sys.modules.get(name)) is not None:
            act(module)
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
