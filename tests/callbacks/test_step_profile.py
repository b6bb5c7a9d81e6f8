"""A trace of some steps lies in the run's folder, changes nothing, and holds nothing of the data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny_run import BARE, REPO_ROOT, convert_shards, load_tiny_config, run

from composer_path.callbacks.step_profile import StepProfile
from composer_path.config.reading import ConfigError

SHORT = ["model.projector.weights=null", *BARE, "trainer.max_duration=3ba"]


def test_the_steps_that_are_asked_for_are_traced_and_nothing_of_the_data(tmp_path: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    plain = run(load_tiny_config("finetune", shards, tmp_path / "plain", SHORT))[1]
    words = [*SHORT, "callbacks.step_profile={after: 1, steps: 2}"]
    watched = run(load_tiny_config("finetune", shards, tmp_path / "watched", words))[1]
    assert watched.losses == plain.losses
    (file,) = (tmp_path / "watched" / "finetune" / "profile").iterdir()
    assert file.name == "rank0-ba3.json.gz"  # after so many steps
    text = gzip.decompress(file.read_bytes()).decode()
    names = [event.get("name", "") for event in json.loads(text)["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2
    assert any(name == "aten::mm" for name in names) and any("DataLoader" in name for name in names)
    records = json.loads((shards / "train.json").read_text(encoding="utf-8"))
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    told = {text[:40] for text in turns if len(text) > 20}
    assert told and not any(words in text for words in told)
    pictures = [path.name for path in (REPO_ROOT / "test_data" / "imgs").iterdir()]
    assert pictures and not any(name in text for name in pictures)


def test_a_run_that_ends_amid_the_steps_writes_no_trace(tmp_path: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    words = [*SHORT, "trainer.max_duration=1ba", "callbacks.step_profile={after: 0, steps: 2}"]
    run(load_tiny_config("finetune", shards, tmp_path, words))
    assert not (tmp_path / "finetune" / "profile").exists()


@pytest.mark.parametrize("keywords", [{"after": -1}, {"steps": 0}])
def test_numbers_that_watch_nothing_are_refused(keywords: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="after must be at least 0 and steps at least 1"):
        StepProfile(**keywords, run_folder=tmp_path)


def test_composers_own_profiler_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.profiler: is not set here; use callbacks\.step_profile"):
        load_tiny_config("finetune", tmp_path, tmp_path, ["trainer.profiler={}"])
