"""A stock processor's chat template gives the ids of training, and a stock LLaVA then our answers; or there is none."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handed_models import IMAGES, REPO_ROOT, trained
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from composer_path.asking.assistant import Assistant
from composer_path.handing_on.llava_hf import write_llava_hf

PICTURES = sorted(path.name for path in IMAGES.iterdir())[:2]
DEMO = REPO_ROOT / "test_data" / "tokenizer"
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("vocabulary", ["tiny", "demo"])
@pytest.mark.parametrize("template", ["llava_llama_2", {"name": "llava_llama_2", "system": 'It\'s "brief".'}])
def test_a_stock_llava_asked_by_its_own_processor_gives_our_answers(
    tmp_path: Path, vocabulary: str, template: Any
) -> None:
    found = trained(template=template, **({"vocabulary": DEMO} if vocabulary == "demo" else {}))
    write_llava_hf(tmp_path / "out", found)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assistant = Assistant(found.model, found.tokenizer, found.text, found.images)
    for question, count in (("What is shown?", 1), ("Compare:\n the two", 2), ("No image?", 0)):
        names = PICTURES[:count]
        parts = [*({"type": "image"} for _ in names), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        said = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(IMAGES / name) for name in names] or None
        inputs = processor(images=images, text=said, add_special_tokens=False, return_tensors="pt")
        new = stock.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        theirs = found.tokenizer.decode(new, skip_special_tokens=True).strip()  # ids are compared, not how they're read
        loaded = [assistant.images.load((IMAGES / name).read_bytes()) for name in names]
        assert theirs == assistant.answer([("human", question)], loaded, max_new_tokens=12)
        assert len(theirs) > 5


def test_a_captioning_model_is_asked_without_a_question(tmp_path: Path) -> None:
    write_llava_hf(tmp_path / "out", found := trained(template="plain"))
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "dropped"}]}]
    said = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == f"{found.tokenizer.bos_token}<image>"


def test_where_a_stock_processor_would_write_other_ids_there_is_no_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = trained(template={"name": "chat_template"})
    found = replace(found, tokenizer=deepcopy(found.tokenizer))
    tokenizer: Any = found.tokenizer
    tokenizer.chat_template = CHAT
    write_llava_hf(tmp_path / "out", found)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    written = (tmp_path / "out" / "chat_template.jinja").is_file()
    assert written == ("no chat template is written" not in caplog.text)
    assert bool(processor.chat_template) == written and not (processor.tokenizer.chat_template and not written)
