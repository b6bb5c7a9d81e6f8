"""Which slow libraries a fresh interpreter has imported after each of a few modules: that of warm_process.py."""

from __future__ import annotations

# One after the other, the quickest first: what one of them leaves alone, those before it do, too.
MODULES = ("composer_path.records.tokenize", "composer_path.asking.assistant")
SLOW = ("torch", "transformers", "streaming", "composer")


def slow_libraries() -> dict[str, set[str]]:
    """Those imported, by module."""
    from warm_process import started

    return {module: set(found) for module, found in started().items()}


def import_and_look() -> dict[str, list[str]]:
    """Import the modules, in a process that has imported nothing else yet."""
    import importlib
    import sys

    assert not set(SLOW) & set(sys.modules)
    found = {}
    for module in MODULES:
        importlib.import_module(module)
        found[module] = [name for name in SLOW if name in sys.modules]
    return found
