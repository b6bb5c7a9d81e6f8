"""Which slow libraries a fresh interpreter has imported after each of a few modules: one interpreter for all tests."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

# One after the other, the quickest first: what one of them leaves alone, those before it do, too.
MODULES = ("composer_path.records.tokenize", "composer_path.asking.assistant")
SLOW = ("torch", "transformers", "streaming", "composer")

_CODE = """
import importlib, json, sys
modules, slow = json.loads(sys.argv[1])
found = {}
for module in modules:
    importlib.import_module(module)
    found[module] = [name for name in slow if name in sys.modules]
print(json.dumps(found))
"""


@functools.cache
def slow_libraries() -> dict[str, set[str]]:
    """Those imported, by module."""
    words = [sys.executable, "-c", _CODE, json.dumps([MODULES, SLOW])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {module: set(found) for module, found in json.loads(done.stdout).items()}
