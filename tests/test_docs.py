"""Every command and link in the documentation is right, and the reading list's line counts are true."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent
PAGES = [REPO_ROOT / "README.md", REPO_ROOT / "CHANGELOG.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            found += [(page.name, line.strip()) for line in block[2].splitlines() if line.strip()]
    return found


def test_the_pages_hold_commands() -> None:
    assert len(PAGES) >= 6
    assert len(commands()) >= 12


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_documented_command_is_one_that_exists(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif words[0] in ("composer", "python") and "train.py" in words:
        from composer_path.config.reading import load_config

        arguments = [word for word in words[words.index("train.py") + 1 :] if word != "--check"]
        load_config(arguments[0], arguments[1:])
    elif words[0] == "python" and words[1].startswith("data_prep/"):
        spec = importlib.util.spec_from_file_location("command", REPO_ROOT / words[1])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if words[2] == "merge":
            module.parse_merge_arguments(words[3:])
        else:
            module.parse_arguments(words[2:])
    elif words[0] == "composer-path":
        from composer_path.cli import parse

        parse(words[1:])
    else:
        assert words[0] in ("tensorboard", "export"), f"{page}: unknown command '{words[0]}'; teach this test"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


def test_the_reading_list_counts_its_lines_rightly() -> None:
    text = (REPO_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) >= 8
    for name, lines in rows:
        actual = len((REPO_ROOT / name).read_text(encoding="utf-8").splitlines())
        assert actual == int(lines), f"{name} has {actual} lines, docs/architecture.md says {lines}"
