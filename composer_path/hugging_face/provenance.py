"""Where an exported model comes from, as far as it is known: what its card and its files say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from composer_path import __version__


@dataclass(frozen=True)
class Provenance:
    """A run and a step of it.

    Attributes:
        run: The run's name.
        step: How many steps were done.
        trained: Modules that learned.
        fingerprint: A hash of the run's settings and files (`composer_path.run.fingerprint`).
    """

    run: str | None = None
    step: int | None = None
    trained: tuple[str, ...] = ()
    fingerprint: str | None = None

    def metadata(self) -> dict[str, str]:
        """What stands in each safetensors file."""
        said = {"composer_path": __version__, "run": self.run, "step": self.step, "fingerprint": self.fingerprint}
        return {key: str(value) for key, value in said.items() if value is not None}


def hash_of(fingerprint: Mapping[str, Any]) -> str:
    """A short name of a run's fingerprint."""
    return xxhash.xxh64_hexdigest(json.dumps(fingerprint, sort_keys=True, default=str).encode())
