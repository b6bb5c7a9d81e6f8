"""Tokenizers and chat templates that several tests of the data share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims contents, asks for today's date, has a system message of its own: what LLaMA-3's template does.
LLAMA3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + "
    "'<|eot_id|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% else %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% endfor %}"
)
_CORPUS = [
    "The image shows sheets of plasma cells with eccentric nuclei.",
    "What organ is this? user assistant system Today Date: 26 Jul 2024",
    "Adenocarcinoma, acinar predominant (grade 2). [INST] question [/INST] answer",
    "<|im_start|>user <|im_end|> <s> </s> <image> im_end eot_id",
]


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_are_read_once() -> Iterator[None]:
    """A vocabulary of 32,000 pieces takes transformers a second, and tests ask for the same ones 300 times."""
    from composer_path.records import vocabulary

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_load_folder", "_load_sentencepiece_file"):
            patch.setattr(vocabulary, name, read_once(getattr(vocabulary, name)))
        yield


def read_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """The same tokenizer for the same files and settings; who changes one copies it first."""
    known: dict[Any, tuple[Any, Any]] = {}

    def state(tokenizer: Any) -> Any:
        added = len(tokenizer.added_tokens_decoder)
        return added, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.padding_side

    def load_or_take(path: Path, **kwargs: Any) -> Any:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = (str(path), repr(stamps), repr(kwargs))
        if key not in known:
            tokenizer = load(path, **kwargs)
            known[key] = (tokenizer, state(tokenizer))
        tokenizer, as_loaded = known[key]
        assert state(tokenizer) == as_loaded, f"a test changed the tokenizer of {path}, which others share: copy it"
        return tokenizer

    return load_or_take


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """Chat templates of the kinds in use, by name."""
    return {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2}


@pytest.fixture
def byte_level_tokenizer():
    """A fresh byte-level BPE tokenizer; a test may change it."""
    return train_byte_level_tokenizer()


@pytest.fixture(scope="session")
def shared_byte_level_tokenizer():
    """The same for all tests; only its chat template may be set."""
    return train_byte_level_tokenizer()


def train_byte_level_tokenizer():
    """A byte-level BPE (the kind of GPT-2, LLaMA-3, Qwen), trained here; its special tokens are added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    markers = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    backend.add_special_tokens([*markers, "<|eot_id|>"])
    backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("    ", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
