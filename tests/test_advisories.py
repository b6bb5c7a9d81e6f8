"""The list of advisories says what is: versions that are affected, tests that exist, and nothing that reaches them."""

from __future__ import annotations

import copy
import os
import re
import stat
from pathlib import Path
from typing import Any

import advisories
import pytest
from packaging.version import Version

from composer_path.images.file import open_image
from composer_path.models.language_model import load_language_model_config, untrained_language_model
from composer_path.records.rules import ImageError

TINY = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
TINY |= {"intermediate_size": 16}


def test_the_package_says_nothing_that_an_advisory_needs() -> None:
    assert list(advisories.problems(advisories.reviewed())) == []
    assert len(advisories.reviewed()) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"package": "left-pad"}, "is in neither list"),
        ({"affected": "<1.0"}, "no list holds an affected version any more; remove the entry"),
        ({"lists": ["newest"]}, r"must name the lists \['pinned'\]"),
        ({"test": "tests/test_advisories.py::test_nothing"}, "there is no test"),
        ({"test": "tests/nowhere.py::test_nothing"}, "there is no test"),
        ({"absent": ["class ComposerPathMLLM"]}, "its reason holds while nothing says class ComposerPathMLLM; found"),
        ({"reached": False}, "reached must be no, maybe or yes"),
        ({"source": "hearsay"}, "say where it was read"),
        ({"more": 1}, "too many or too few: more"),
    ],
)
def test_an_entry_that_no_longer_holds_is_a_problem(change: dict[str, Any], message: str) -> None:
    (entry,) = [entry for entry in advisories.reviewed() if entry["id"] == "CVE-2026-24747"]
    [problem] = advisories.problems([copy.deepcopy(entry) | change])
    assert re.search(message, problem)


def pip_audit(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip-audit on the PATH that gives this answer."""
    program = folder / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


KNOWN = '{"dependencies": [{"name": "torch", "vulns": [{"id": "X-1", "aliases": ["CVE-2026-24747"]}]}]}'
NEW = '{"dependencies": [{"name": "torch", "vulns": [{"id": "CVE-2099-1", "aliases": []}]}]}'
OUT_OF_REACH = '{"dependencies": [{"name": "torch", "skip_reason": "not found"}, {"name": "six", "vulns": []}]}'


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (KNOWN, 0, "0 problems"),
        (NEW, 1, "pinned: torch: CVE-2099-1 is not in advisories.yaml; review it"),
        (OUT_OF_REACH, 0, "newest: pip-audit isn't installed or doesn't reach its database"),
        ("no answer", 0, "doesn't reach its database"),
    ],
)
def test_what_pip_audit_finds_must_be_reviewed_and_silence_is_not_called_an_answer(
    answer: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pip_audit(tmp_path, answer, monkeypatch)
    assert advisories.main() == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "head",
    [
        b"8BPS\0\1",
        b"SIMPLE  =  T",
        b"\xff\xfe\0\0",
        b"\0\0\0\0\0\0\0\4",
        b"%PDF-1.7\n",
        b"%!PS-Adobe",
    ],
    ids=["psd", "fits", "gd", "mcidas", "pdf", "eps"],
)
def test_formats_of_advisories_are_opened_by_nobody(head: bytes) -> None:
    with pytest.raises(ImageError, match=r"no known image format|\[unsupported-image\]"):
        open_image(head + bytes(4096))


def test_a_configuration_chooses_no_attention() -> None:
    for key in ("_attn_implementation_internal", "_attn_implementation", "attn_implementation"):
        config = TINY | {key: "stranger/kernel"}
        model = untrained_language_model(config, attention="sdpa")
        assert "stranger" not in str(model.config._attn_implementation)
        assert load_language_model_config(config).model_type == "llama"


def test_versions_are_read_as_the_lists_have_them() -> None:
    newest, pinned = advisories.versions("newest"), advisories.versions("pinned")
    assert Version(newest["torch"]) > Version(pinned["torch"]) and newest["pillow"] == pinned["pillow"]
