"""How a run takes GPU memory."""

from __future__ import annotations

import os

import pytest
from omegaconf import OmegaConf

from composer_path.train import train


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_gpu_memory_is_taken_in_segments_that_grow_unless_the_user_says_otherwise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer_path.config.reading.plain", None)  # nothing is built
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    with pytest.raises(TypeError):
        train(OmegaConf.create())
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    os.environ[name] = "backend:native"
    with pytest.raises(TypeError):
        train(OmegaConf.create())
    assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == {name: "backend:native"}
