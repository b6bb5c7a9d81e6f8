"""The road through a bucket, as a new user goes it: convert, be killed, resume, train while the network misbehaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import KEY, SECRET, Proxy, Spoil, serve_s3
from session_processes import wait_until_gone
from tiny_run import Interrupted, Witness, convert_shards, load_tiny_config, run, tiny_overrides

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parent.parent
BUCKET = "s3://bucket/train"
LOST = "part-00030/shard.00000.mds"
NUM_RECORDS, NUM_STEPS = 336, 42


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What reaches the bucket; without it the commands find nothing."""
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    return {**os.environ, **keys, "AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[tuple[Path, Proxy]]:
    """The server's folder, and a proxy before it."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with serve_s3(root, written=True) as port:
        proxy = Proxy(port)
        proxy.start()
        environment["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        yield root / "bucket", proxy
        proxy.stop()


def convert_command(out: str | Path, key: Path, *more: str) -> list[str]:
    words = [sys.executable, "data_prep/convert.py", "--data", "test_data/data.json", "--images", "test_data/imgs"]
    words += ["--out", str(out), "--key", str(key), "--partition-size", "6", "--size-limit", "64kb", "--workers", "2"]
    return [*words, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def num_done(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("done.json"))


@pytest.fixture(scope="module")
def converted(
    bucket: tuple[Path, Proxy], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The set on disk, converted undisturbed; the bucket's was killed twice, with so many parts done."""
    folder, work = bucket[0] / "train", tmp_path_factory.mktemp("converted")
    killed_at: list[int] = []
    for wanted in (4, 25):
        line = convert_command(BUCKET, work / "key", *["--resume"] * bool(killed_at))
        running = subprocess.Popen(line, cwd=REPO, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 120
            while num_done(folder) < wanted and time.monotonic() < end:
                assert running.poll() is None
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
            running.wait()
            wait_until_gone(running.pid, 20)
        finally:
            running.kill()
        assert not (folder / "index.json").exists()
        killed_at.append(num_done(folder))
    for out, more in ((BUCKET, ["--resume"]), (work / "set", [])):
        line = convert_command(out, work / "key", *more)
        subprocess.run(line, cwd=REPO, env=environment, check=True, capture_output=True, timeout=300)
    return work / "set", killed_at


def test_a_conversion_killed_twice_ends_with_the_bytes_of_an_undisturbed_one(
    converted: tuple[Path, list[int]], bucket: tuple[Path, Proxy]
) -> None:
    on_disk, (first, second) = converted
    assert 4 <= first < second < NUM_RECORDS // 6
    assert contents(bucket[0] / "train") == contents(on_disk)


def train_command(save_root: Path, shards: Path, dataset: dict[str, Any], ranks: int = 1) -> list[str]:
    words = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), "train.py", "yamls/demo/finetune.yaml"]
    words += tiny_overrides("finetune", shards, save_root)
    words += ["model.projector.weights=null", "trainer.max_duration=1ep", "trainer.eval_interval=99ep"]
    words += ["trainer.save_interval=99ep", "train_loader.num_workers=2", "trainer.dist_timeout=120"]
    return [*words, *(f"train_loader.dataset.{key}={value}" for key, value in dataset.items())]


def start_training(line: list[str], environment: dict[str, str], seconds: float = 400) -> tuple[int, str]:
    """Exit code and output of a run that leaves no process."""
    running = subprocess.Popen(
        line,
        cwd=REPO,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output = running.communicate(timeout=seconds)[0]
        wait_until_gone(running.pid, 30)
        return running.returncode, output
    finally:
        running.kill()


def losses_of(save_root: Path) -> list[float]:
    """Of each step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for file in (save_root / "finetune" / "runs" / "finetune").glob("events.*"):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss/train/total" in accumulator.Tags()["scalars"]:
            losses |= {event.step: event.value for event in accumulator.Scalars("loss/train/total")}
    return [losses[step] for step in sorted(losses)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


def test_training_through_a_faulty_network_has_the_losses_of_training_from_disk(
    converted: tuple[Path, list[int]],
    bucket: tuple[Path, Proxy],
    environment: dict[str, str],
    shards: Path,
    tmp_path: Path,
) -> None:
    proxy = bucket[1]
    kinds = ["status:503", "reset", "cut:9000", "slow:40000", "flip:2000"]
    shards_of_bucket = [f"part-{number:05}/shard.00000.mds" for number in range(0, 50, 2)]
    proxy.spoils = [Spoil("GET .*/index.json", "status:503", 1)]
    for at, name in enumerate(shards_of_bucket):
        how = kinds[at % 5]
        proxy.spoils.append(Spoil(f"GET .*{name}", how, 1 if "slow" in how else 2))  # slowly, a file comes at once
    places = {"disk": {"local": converted[0]}, "bucket": {"local": tmp_path / "cache", "remote": BUCKET}}
    for name, place in places.items():
        code, output = start_training(train_command(tmp_path / name, shards, place), environment)
        assert code == 0, output[-4000:]
        assert SECRET not in output
    assert all(spoil.times == 0 for spoil in proxy.spoils)
    losses = losses_of(tmp_path / "bucket")
    assert len(losses) == NUM_STEPS
    assert losses == losses_of(tmp_path / "disk")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_that_is_lost_for_good_ends_all_processes_in_one_named_error(
    ranks: int,
    converted: tuple[Path, list[int]],
    bucket: tuple[Path, Proxy],
    environment: dict[str, str],
    shards: Path,
    tmp_path: Path,
) -> None:
    bucket[1].spoils = [Spoil(f"GET .*{LOST}", "status:404")]
    place = {"local": tmp_path / "cache", "remote": BUCKET, "fault_timeout": 20}
    start = time.monotonic()
    code, output = start_training(train_command(tmp_path / "run", shards, place, ranks), environment)
    assert code != 0
    named = set(re.findall(r"StreamError: (shard .*)", output))
    assert named == {
        f"shard {LOST} of {BUCKET}: missing: answer 404 NoSuchKey; check remote, or convert the data again"
    }, output[-4000:]
    assert time.monotonic() - start < 150
    assert not (tmp_path / "cache" / LOST).exists()


def test_a_mixture_goes_on_in_its_second_epoch_as_if_nothing_had_been(
    converted: tuple[Path, list[int]],
    bucket: tuple[Path, Proxy],
    environment: dict[str, str],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, environment[name])
    bucket[1].spoils = [Spoil(r"GET .*part-0000\d/shard", "status:503", 2)]

    def config(save_root: str, cache: str) -> Any:
        captions = f"{{local: {shards}/captions, template: plain, repeat: 0.5, loss_weight: 0.25}}"
        chats = f"{{local: {tmp_path / cache}, remote: {BUCKET}, template: llava_llama_2, choose: 28}}"
        more = ["model.projector.weights=null", "train_loader.dataset.local=null", "trainer.save_interval=1ba"]
        more += [f"train_loader.dataset.streams={{captions: {captions}, chats: {chats}}}", "callbacks.source_report={}"]
        return load_tiny_config("finetune", shards, tmp_path / save_root, more)

    _, whole = run(config("whole", "cache"))
    assert sorted(whole.losses) == list(range(10))  # 12 captions and 28 chats an epoch, 8 a step
    with pytest.raises(Interrupted):
        run(config("halved", "cache2"), Witness(stop_after=7))
    _, rest = run(config("halved", "cache3"))  # a machine with an empty cache; this process has the other one
    assert sorted(rest.losses) == [7, 8, 9]
    assert {step: rest.samples[step] for step in rest.losses} == {step: whole.samples[step] for step in rest.losses}
    assert {step: rest.losses[step] for step in rest.losses} == {step: whole.losses[step] for step in rest.losses}
    epochs = [[index for step in steps for index in whole.samples[step]] for steps in (range(5), range(5, 10))]
    assert [sum(index < 24 for index in epoch) for epoch in epochs] == [12, 12]
    assert epochs[0] != epochs[1]
    assert {"source/captions/loss", "source/chats/loss"} <= set(whole.metrics)
