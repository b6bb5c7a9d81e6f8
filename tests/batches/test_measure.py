"""Claims about what lengths depend on, and that what counts them counts alike in another process."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from composer_path.batches.measure import Measure, lengths_key, template_hash, tokenizer_hash
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer, text_encoder
from composer_path.shards.lengths import LengthsError


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


def test_a_tokenizer_is_known_by_its_content_not_by_its_path(
    tokenizer: Any, mistral_tokenizer_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(mistral_tokenizer_path, tmp_path / "copy")
    assert tokenizer_hash(load_tokenizer(tmp_path / "copy")) == tokenizer_hash(tokenizer)


def test_whatever_changes_ids_changes_a_tokenizers_hash(tokenizer: Any, mistral_tokenizer_path: Path) -> None:
    changed = [copy.deepcopy(load_tokenizer(mistral_tokenizer_path)) for _ in range(3)]
    changed[0].add_tokens(["<marker>"], special_tokens=True)
    changed[1].chat_template = "{{ messages }}"
    changed[2].eos_token = "<unk>"
    hashes = {tokenizer_hash(one) for one in (tokenizer, *changed)}
    assert len(hashes) == 4


def test_another_vocabulary_has_another_hash(tokenizer: Any, shared_byte_level_tokenizer: Any) -> None:
    assert tokenizer_hash(shared_byte_level_tokenizer) != tokenizer_hash(tokenizer)


def test_templates_differ_by_name_and_by_every_setting() -> None:
    templates = ["plain", "llava_llama_2", {"name": "llava_llama_2", "system": None}, "chat_template"]
    templates += [{"name": "chat_template", "date": "2020-01-01"}, {"name": "chat_template", "system": "Hi."}]
    hashes = [template_hash(get_template(template)) for template in templates]
    assert len(set(hashes)) == len(templates)
    assert hashes == [template_hash(get_template(template)) for template in templates]
    assert hashes[1].startswith("llava_llama_2-")


def test_a_key_holds_no_text(tokenizer: Any) -> None:
    template = get_template({"name": "llava_llama_2", "system": "You look at slides of Mr. Miller."})
    key = lengths_key(tokenizer, TextPreparation(template, 8, 512))
    assert "Miller" not in str(key)
    assert key == lengths_key(tokenizer, TextPreparation(template, 8, 512))


def test_images_of_different_lengths_are_refused(tokenizer: Any) -> None:
    with pytest.raises(LengthsError, match="the same number of tokens for every image"):
        lengths_key(tokenizer, TextPreparation(get_template("plain"), lambda index: 4, 512))


def test_a_set_changes_its_index_in_the_key_and_nothing_else(tokenizer: Any) -> None:
    key = lengths_key(tokenizer, TextPreparation(get_template("plain"), 8, 512))
    assert key.index == ""
    assert [*key.of_set(b"{}").differences(vars(key))] == ["the set (its index.json)"]
    assert key.of_set(b"{}") != key.of_set(b"{ }")


def test_a_measure_travels_to_another_process_and_is_built_there_once(tokenizer: Any) -> None:
    measure = Measure(TextPreparation(get_template("llava_llama_2"), 8, 512), text_encoder(tokenizer))
    turns = (Turn("human", "<image>\nWhat is it?"), Turn("assistant", "A gland."))
    conversation = Conversation(turns, images=("",))
    one, two = (pickle.loads(pickle.dumps(measure)) for _ in range(2))
    assert one is two and one is not measure
    tokens, answers, images = measure(conversation)
    assert (one(conversation), images) == ((tokens, answers, 1), 1)
    assert 8 < tokens < 200 and 1 < answers < 10


def test_a_sample_that_cannot_be_used_is_one_token(tokenizer: Any) -> None:
    conversation = Conversation((Turn("human", "What is it?"), Turn("assistant", "A gland.")) * 2)
    for template, limit in (("plain", 512), ("llava_llama_2", 10)):  # no caption; the answers are cut away
        measure = Measure(TextPreparation(get_template(template), 8, limit), text_encoder(tokenizer))
        assert measure(conversation) == (1, 0, 0)
