"""The failure table as a whole: each row with 0 and with 2 workers, and on 2 ranks, where all must know of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_rows import BAD, ROWS, make_sets, outcome, place_of
from s3_server import KEY, SECRET, Proxy, Spoil, serve_s3
from session_processes import wait_until_gone
from warm_process import popen

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
LONG = ("endless", "nothing but", "black hole", "too slow", "cache of another run")


@pytest.fixture
def remotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bucket with each row's set, behind a proxy that does what the rows say."""
    folder = tmp_path / "s3" / "bucket"
    make_sets(folder)
    with serve_s3(tmp_path / "s3") as port:
        proxy = Proxy(port)
        proxy.spoils = [
            Spoil(f"{place_of(name)}/{row.spoil[0]}", *row.spoil[1:]) for name, row in ROWS.items() if row.spoil
        ]
        proxy.start()
        environment = ENVIRONMENT | {"S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        for variable, value in (environment | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
            monkeypatch.setenv(variable, value)
        yield folder
        proxy.stop()


def check(name: str, found: tuple[str, str, int], ranks: int, cache: Path) -> None:
    rule, text, seen = found
    row = ROWS[name]
    assert rule == row.rule, text
    if row.rule:
        assert len(text.splitlines()) == 1
        assert SECRET not in text
        assert BAD in text or "index.json" in text or row.rule.startswith("cache-") or row.rule == "no-such-hash"
        assert not list(cache.glob(f"{BAD}*")) or row.rule == "unreadable"
    else:
        assert seen == row.num_samples // ranks
        assert sorted(path.suffix for path in cache.glob("*.part")) == []


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_each_row_comes_to_what_the_table_says(num_workers: int, remotes: Path, tmp_path: Path) -> None:
    for name in ROWS:
        if num_workers or not name.startswith(LONG):
            cache = tmp_path / place_of(name)
            check(name, outcome(name, remotes, cache, num_workers), 1, cache)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_of_two_ranks_learn_of_each_row(num_workers: int, remotes: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    caches.mkdir()
    plan = {"remotes": str(remotes), "caches": str(caches), "num_workers": num_workers, "out": str(tmp_path)}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("fault_rows.py")
    words = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script), str(tmp_path / "plan.json")]
    log = tmp_path / "log"
    with open(log, "w") as file:
        run = popen(words, stdout=file, stderr=file, start_new_session=True, env=os.environ.copy())
        try:
            assert run.wait(timeout=400) == 0, log.read_text()[-3000:]
            wait_until_gone(run.pid, 20)
        finally:
            run.kill()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found.keys() == ROWS.keys()
        for name in ROWS:
            check(name, tuple(found[name]), 2, caches / place_of(name))
