"""What `imports` takes, what it refuses and how it says so; nothing is imported that wasn't named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_problems import problems_of
from tiny_run import REPO_ROOT

from composer_path.commands.verb import run_verb
from composer_path.config.reading import ConfigError, load_config
from composer_path.own_parts.imports import ImportsError, import_parts, installed_parts
from composer_path.own_parts.registry import own_classes, set_parts

CALLBACK = """
from composer.core import Callback

class Counter(Callback):
    def __init__(self, every: int = 1, scale: float = 1.0, label=None, *, names: "list[str] | None" = None):
        pass
"""


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    before = set(sys.modules)
    yield
    set_parts(())
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__composer_path_file__", None):
            del sys.modules[name]


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(REPO_ROOT)
    (tmp_path / "own_counter.py").write_text(CALLBACK)
    (tmp_path / "run.yaml").write_text((REPO_ROOT / "yamls" / "demo" / "pretrain.yaml").read_text())
    return tmp_path / "run.yaml"


BESIDE = "imports=[./own_counter.py]"


def test_a_files_classes_are_known_by_their_names_and_their_signatures_are_sections(yaml: Path) -> None:
    config = load_config(yaml, [BESIDE, "callbacks.counter.every=2"])
    assert config.callbacks.counter == {"every": 2, "scale": 1.0, "label": None, "names": None}
    assert config.imports == [str(yaml.parent / "own_counter.py")]
    assert load_config(yaml).imports == [] and not own_classes("callbacks")  # of the YAML that was read last


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("callbacks.conter={}", "callbacks.conter: unknown key; did you mean callbacks.counter?"),
        ("callbacks.counter.evry=2", "callbacks.counter.evry: unknown key; did you mean callbacks.counter.every?"),
        ("callbacks.counter.every=often", "callbacks.counter.every: found the text 'often'; it must be a whole number"),
        ("callbacks.counter.every=true", "callbacks.counter.every: found true; it must be a whole number"),
        (
            "callbacks.counter.names=[1]",
            "callbacks.counter.names: found a list of 1; it must be a list of: text or null",
        ),
    ],
)
def test_a_mistake_in_an_own_section_is_named_as_in_others(yaml: Path, words: str, line: str) -> None:
    assert problems_of(yaml, BESIDE, words) == [line]


def test_a_keyword_without_a_type_takes_any_plain_value(yaml: Path) -> None:
    for value in ("1", "text", "[1, a]", "{a: 1}", "null"):
        load_config(yaml, [BESIDE, f"callbacks.counter.label={value}"])


BROKEN = [
    ("x = 1\ny = nothing\n", "own.py, line 2: NameError: name 'nothing' is not defined"),
    ("def f(:\n", "own.py, line 1: SyntaxError: "),
    ("import no_such_module_at_all\n", "own.py, line 1: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ("import json\n\njson.loads('{')\n", "own.py, line 3: JSONDecodeError"),
    ("import sys\nsys.exit(3)\n", "own.py, line 2: SystemExit: 3"),
    ("def f():\n    f()\nf()\n", "own.py, line 2: RecursionError"),
    ("x = '\0'\n", "can't be imported: "),
]


@pytest.mark.parametrize(("text", "line"), BROKEN, ids=range(len(BROKEN)))
def test_a_module_that_fails_is_one_line_with_the_place(yaml: Path, text: str, line: str) -> None:
    (yaml.parent / "own.py").write_text(text)
    (problem,) = problems_of(yaml, "imports=[./own.py]")
    assert problem.startswith("imports: 'own.py' can't be imported: ") and line in problem and "own" not in sys.modules


UNFIT = {
    "class Incomplete(Algorithm):\n    def match(self, event, state): return True\n": "class Incomplete lacks apply;",
    "class GradientClipping(Algorithm):\n    match = apply = lambda *_: None\n": "gradient_clipping, a name that",
    "class LrMonitor(Callback): pass\n": "",
    "class LRMonitor(Callback): pass\n": "callbacks lr_monitor, a name that is taken already; rename the class",
    "class StainJitter(Algorithm):\n    match = apply = lambda *_: None\n": "stain_jitter, a name that is taken",
    "class AB(Callback): pass\nclass Ab(Callback): pass\n": "found ab in 'own.py' twice",
    "class Odd(Callback):\n    def __init__(self, x, /): pass\n": "class Odd takes x by its position only",
    "class Empty(Projector): pass\n": "class Empty lacks project;",
    "class Empty(VisionTrunk): pass\n": "class Empty lacks forward_features;",
    "class _Hidden(Callback): pass\n": "'./own.py' holds no part;",
    "from composer.callbacks import LRMonitor\n": "'./own.py' holds no part;",
}
HEAD = """
from composer.core import Algorithm, Callback
from composer_path.models.projector import Projector
from composer_path.models.trunk import VisionTrunk
"""


@pytest.mark.parametrize("text", [text for text, line in UNFIT.items() if line])
def test_a_class_that_cant_be_a_part_is_refused(yaml: Path, text: str) -> None:
    (yaml.parent / "own.py").write_text(HEAD + text)
    (problem,) = problems_of(yaml, "imports=[./own.py]")
    assert UNFIT[text] in problem


def test_two_modules_with_one_name_are_refused(yaml: Path) -> None:
    (yaml.parent / "own_second.py").write_text(CALLBACK)
    (problem,) = problems_of(yaml, "imports=[./own_counter.py, ./own_second.py]")
    assert "found counter in 'own_counter.py' and 'own_second.py'" in problem


@pytest.mark.parametrize(
    ("imports", "line"),
    [
        ("own_counter", "imports: found no module 'own_counter'; did you mean ./own_counter.py?"),
        ("no_such_thing", "imports: found no module 'no_such_thing'; install it"),
        ("./missing.py", "imports: must name a Python file, found no such file at"),
        (".", "imports: found '.', which is no name of a module"),
        ("os; print(1)", "imports: found 'os; print(1)', which is no name of a module"),
        ("./json.py", "imports: 'json.py' has the name of another module, json; rename the file"),
        ("./my-parts.py", "imports: 'my-parts.py' is no name of a Python file"),
        ("${oc.env:HOME}", "imports: found"),
        ("json", "imports: 'json' holds no part;"),
    ],
)
def test_what_names_no_code_of_ones_own_is_refused(yaml: Path, imports: str, line: str) -> None:
    for name in ("json.py", "my-parts.py"):
        (yaml.parent / name).write_text(CALLBACK)
    (problem,) = problems_of(yaml, f"imports=['{imports}']")
    assert problem.startswith(line)


def test_imports_are_a_list_of_texts(yaml: Path) -> None:
    for value in ("./own_counter.py", "[1]", "{a: b}", "[null]", "['']"):
        (problem,) = problems_of(yaml, f"imports={value}")
        assert "it must be a list of modules and files" in problem


def test_with_no_imports_nothing_is_run_and_the_yaml_is_refused_by_name(
    yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (yaml.parent / "own.py").write_text("raise SystemError('it was run')\n")
    for verb in ("train", "check", "plan"):
        assert run_verb(verb, [str(yaml), "imports=[./own.py]", "--no-imports"]) == 2
        error = capsys.readouterr().err
        assert "'./own.py' is not to be run here" in error and "it was run" not in error
    with pytest.raises(ConfigError, match="not to be run here"):
        load_config(yaml, ["imports=[json]"], allowed_imports=[])
    assert run_verb("check", [str(yaml), "--no-imports"]) == 0
    assert run_verb("ask", [".", "x", "--import", "json", "--no-imports"]) == 2


def test_a_runs_record_imports_nothing_that_isnt_given_again(yaml: Path) -> None:
    marker = yaml.parent / "was_run"
    (yaml.parent / "own.py").write_text(f"{CALLBACK}\nopen({str(marker)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="is not to be run here"):
        load_config(yaml, ["imports=[./own.py]"], allowed_imports=["./other.py"])
    assert not marker.exists()
    load_config(yaml, ["imports=[./own.py]"], allowed_imports=[str(yaml.parent / "own.py")])
    assert marker.exists()


def test_an_edited_file_is_read_anew(yaml: Path) -> None:
    load_config(yaml, [BESIDE])
    (yaml.parent / "own_counter.py").write_text(CALLBACK.replace("Counter", "Clock"))
    load_config(yaml, [BESIDE, "callbacks.clock={}"])
    assert list(own_classes("callbacks")) == ["clock"]


def test_from_python_parts_are_added(yaml: Path) -> None:
    import_parts(["own_counter.py"], yaml.parent)
    import_parts(["own_counter.py"], yaml.parent)  # again is no clash
    assert list(own_classes("callbacks")) == ["counter"]
    with pytest.raises(ImportsError, match="no such file"):
        import_parts(["./missing.py"], yaml.parent)


ENTRY = "[composer_path.callbacks]\ncounter = own_package:Counter\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that offers a callback."""
    place = tmp_path / "site"
    info = place / "own_package-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "own_package.py").write_text(CALLBACK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    monkeypatch.syspath_prepend(place)
    installed_parts.cache_clear()
    yield place
    sys.modules.pop("own_package", None)
    installed_parts.cache_clear()


def test_an_installed_packages_part_is_imported_where_a_yaml_uses_it(yaml: Path, package: Path) -> None:
    load_config(yaml)
    assert "own_package" not in sys.modules
    assert load_config(yaml, ["callbacks.counter.every=3"]).callbacks.counter.every == 3
    assert problems_of(yaml, "callbacks.counter.evry=3")[0].endswith("did you mean callbacks.counter.every?")
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(yaml, ["callbacks.counter.every=3"], allowed_imports=[])


def test_an_entry_point_that_fails_or_is_another_thing_is_named(yaml: Path, package: Path) -> None:
    info = package / "own_package-1.0.dist-info" / "entry_points.txt"
    (package / "own_package.py").write_text("1 / 0\n")
    where = "entry point composer_path.callbacks 'counter' of package own-package: "
    (problem,) = problems_of(yaml, "callbacks.counter={}")
    assert problem.startswith(where + "can't be imported: own_package.py, line 1: ZeroDivisionError")
    (package / "own_package.py").write_text(CALLBACK + "\nnumber = 1\n")
    installed_parts.cache_clear()
    for target, why in (("number", "must name a class of callbacks"), ("Callback", "must name a class of callbacks")):
        info.write_text(ENTRY.replace("own_package:Counter", f"own_package:{target}"))
        installed_parts.cache_clear()
        assert problems_of(yaml, "callbacks.counter={}")[0].startswith(where + why)
    info.write_text(ENTRY.replace("counter =", "clock ="))
    installed_parts.cache_clear()
    assert "must be named as its class Counter in snake_case" in problems_of(yaml, "callbacks.clock={}")[0]
