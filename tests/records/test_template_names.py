"""A tokenizer's folder names no file outside of the folder that it is saved to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from composer_path.records.vocabulary import load_tokenizer, save_tokenizer


def tokenizer_with(template: str, folder: Path, repo_root: Path) -> Path:
    shutil.copytree(repo_root / "test_data" / "tokenizer", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "{{ a }}"}, {"name": template, "template": "{{ b }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "..", ""])
def test_a_chat_template_whose_name_is_a_path_is_refused(name: str, tmp_path: Path, repo_root: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path: chat templates in .* must be named by words, found"):
        load_tokenizer(tokenizer_with(name, tmp_path / "tokenizer", repo_root))


def test_further_chat_templates_are_saved_within_the_folder(tmp_path: Path, repo_root: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_with("tool_use", tmp_path / "tokenizer", repo_root))
    (tmp_path / "out" / "saved").mkdir(parents=True)
    save_tokenizer(tokenizer, tmp_path / "out" / "saved")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["saved"]
    assert (tmp_path / "out" / "saved" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ b }}"
