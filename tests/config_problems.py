"""The mistakes that a configuration is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_path.config.reading import ConfigError, load_config


def problems_of(path: Path, *overrides: str) -> list[str]:
    """A line for each."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems
