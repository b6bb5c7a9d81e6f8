"""The public names: lazily imported, each from where it says, and the same for type checkers."""

from __future__ import annotations

import ast
from pathlib import Path

import composer_path


def test_the_stub_that_type_checkers_read_has_the_same_names_from_the_same_modules() -> None:
    stub = ast.parse(Path(composer_path.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    in_stub = {name.asname: f"{node.module}.{name.name}" for node in imports for name in node.names}
    assert in_stub == {name: f"composer_path.{module}.{name}" for name, module in composer_path._MODULE_OF.items()}


def test_every_public_name_is_there_and_no_other() -> None:
    for name in composer_path.__all__:
        assert getattr(composer_path, name) is not None
    assert not hasattr(composer_path, "none")
    assert {*composer_path.__all__, "__version__"} <= set(dir(composer_path))
