"""What a YAML imports: modules and files that it names itself, of which a command may allow some or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from composer_path.own_parts.imports import ImportsError, located, source_of, use_imports, words_of


def import_named(
    config: DictConfig, given: Mapping[str, Any], folder: Path, allowed: Sequence[str] | None
) -> list[str]:
    """Import what a YAML names, or of that what is allowed; returns what is wrong.

    Args:
        config: The YAML, in which files are then written with their whole places.
        given: The same as plain values.
        folder: Of the YAML.
        allowed: Modules and files with their places; None for whatever the YAML names, beside what installed packages
            offer under names that it uses.
    """
    names = given.get("imports") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "${" not in name for name in names):
        fix = "it must be a list of modules and files, written out, as in [./my_parts.py]"
        return [f"imports: found {str(names)[:80]!r}; {fix}"]
    if allowed is not None:
        places = {source_of(name): name for name in allowed}
        if refused := [name for name in names if source_of(name) not in places]:
            fix = "leave --no-imports away, or give --import with its place, if you trust it"
            return [f"imports: '{name}' is not to be run here; {fix}" for name in refused]
        names, folder = [places[source_of(name)] for name in names], Path.cwd()
    if names or "imports" in given:
        config["imports"] = [located(name, folder) for name in names]
    try:
        use_imports(names, folder, () if allowed is not None else words_of(given))
    except ImportsError as error:
        return error.problems
    return []
