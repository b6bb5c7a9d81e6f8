"""transformers knows our models after `import composer_path`, which imports none of it, whichever comes first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto, processing_auto

from composer_path.hugging_face import registration
from composer_path.hugging_face.configuration import ComposerPathConfig
from composer_path.hugging_face.modeling import ComposerPathForConditionalGeneration

ORDERS = {
    "ours first": "import composer_path; import transformers",
    "transformers first": "import transformers; import composer_path",
    "its model classes first": "from transformers import AutoModelForCausalLM, AutoProcessor; import composer_path",
    "our configuration": "import composer_path.hugging_face.configuration",
    "our model": "import composer_path.hugging_face.modeling",
    "our processor": "import composer_path.hugging_face.processor",
    "our image processor": "import composer_path.hugging_face.image_processor",
    "our language model": "import composer_path.models.language_model",
}
KNOWN = """
import transformers
config = transformers.CONFIG_MAPPING["composer_path"]
mapping = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
found = IMAGE_PROCESSOR_MAPPING[config]
found = list(found.values()) if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
names = [one.__name__ for one in found if one]
assert names[0] == "ComposerPathImageProcessor", names
assert PROCESSOR_MAPPING[config].__name__ == "ComposerPathProcessor"
assert mapping[config].__name__ == "ComposerPathForConditionalGeneration"
"""


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_import_brings_neither_torch_nor_transformers() -> None:
    code = (
        "import composer_path, sys, json; print(json.dumps([n for n in ('torch', 'transformers') if n in sys.modules]))"
    )
    assert json.loads(run(code)) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_all_auto_classes_know_ours_whatever_is_imported_first(order: str) -> None:
    run(ORDERS[order] + KNOWN)


def test_the_names_of_transformers_that_a_registration_stands_on_are_there() -> None:
    """They are no public interface; what fails here says which of them changed."""
    assert set(registration.REGISTRATIONS) == {
        module.__name__ for module in (configuration_auto, modeling_auto, image_processing_auto, processing_auto)
    }
    mapping = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for name in ("_reverse_config_mapping", "_config_mapping", "_modules", "_model_mapping"):
        assert isinstance(getattr(mapping, name), dict), name
    assert mapping._model_mapping is modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert mapping[ComposerPathConfig] is ComposerPathForConditionalGeneration
    assert ComposerPathConfig in mapping and ComposerPathConfig in mapping.keys()  # noqa: SIM118
    assert ComposerPathForConditionalGeneration in mapping.values()
    assert "composer_path" not in configuration_auto.CONFIG_MAPPING_NAMES  # which is transformers' own


def test_registering_again_changes_nothing() -> None:
    before = list(sys.meta_path)
    registration.register()
    assert sys.meta_path == before


@pytest.mark.slow
def test_a_tokenizer_is_loaded_without_a_word_of_an_unknown_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny_model import tiny_model_folder

    folder = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")
    done = subprocess.run([sys.executable, "-c", LOADS, str(Path(folder))], capture_output=True, text=True, check=True)
    assert "model of type" not in done.stderr and "not recognize" not in done.stderr, done.stderr


LOADS = """
import sys
from composer_path.records.vocabulary import load_tokenizer
load_tokenizer(sys.argv[1])
"""
