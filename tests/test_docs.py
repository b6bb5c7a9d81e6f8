"""Every command and link in the documentation is right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import parse as gpu_options
from composer_path.commands.verb import parse

REPO_ROOT = Path(__file__).resolve().parent.parent
PAGES = [REPO_ROOT / "README.md", REPO_ROOT / "CHANGELOG.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]
VERBS = {"convert": "convert", "view_shards": "shards", "encode": "encode", "measure_lengths": "lengths"}
TESTS_OF_THE_SEAM = sorted((REPO_ROOT / "tests" / "seam").glob("test_*.py"))
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
    elif words[0] in ("composer", "python") and {"train.py", "composer_path.train"} & set(words):
        from composer_path.config.reading import load_config

        start = next(number for number, word in enumerate(words) if word in ("train.py", "composer_path.train"))
        options = parse("train", words[start + 1 :])
        load_config(options.yaml, options.words)
    elif words[0] == "python" and words[1].startswith("data_prep/"):
        assert (REPO_ROOT / words[1]).is_file()
        verb = VERBS[Path(words[1]).stem]
        parse(*(words[2], words[3:]) if words[2] == "merge" else (verb, words[2:]))
    elif words[0] == "composer-path":
        parse(words[1], words[2:])
    elif words[0] in ("pip", "uv"):
        files = [word for word in words if "/" in word]
        assert words[-1] in (".", *files) and all((REPO_ROOT / file).is_file() for file in files)
    elif words[0] == "benchmarks/gpu.sh":
        assert gpu_options(words[1:]).results
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


def test_every_test_that_the_seam_names_exists_and_every_contract_is_named() -> None:
    named: set[tuple[str, str]] = set()
    for row in (REPO_ROOT / "docs" / "seam.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("|") and "`test_" in row:
            place = re.search(r"\| (?:(trainer|checkpoint|streaming|originals)|`(tests/\S+\.py)`): ", row)
            assert place, row
            contract = "test_originals" if place[1] == "originals" else f"test_{place[1]}_contract"
            file = place[2] or f"tests/seam/{contract}.py"
            named |= {(file, name) for name in re.findall(r"`(test_\w+)`", row)}
    assert len(named) > 40
    files = {file for file, _ in named} | {str(path.relative_to(REPO_ROOT)) for path in TESTS_OF_THE_SEAM}
    written = {file: (REPO_ROOT / file).read_text(encoding="utf-8") for file in files}
    there = {
        (file, name) for file, text in written.items() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    assert named <= there, named - there
    assert {pair for pair in there if pair[0].startswith("tests/seam/")} <= named


def test_what_the_page_of_promises_names_is_there() -> None:
    page = (REPO_ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (REPO_ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert len(names) > 15 and [name for name in names if f"def {name}(" not in tests] == []
    files = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", page)
    assert len(files) > 8 and [file for file in files if not (REPO_ROOT / file).is_file()] == []
    assert "SOAK_" not in page  # figures that were never filled in
