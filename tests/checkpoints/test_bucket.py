"""Checkpoints in a bucket: whole or not there, told from an outage, and a run goes on from them on another machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gcs_server import serve_gcs
from s3_server import KEY, SECRET, Proxy, Spoil, serve_s3
from tiny_run import Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.checkpoints.bucket import BucketFolder
from composer_path.checkpoints.manifest import CheckpointError, Manifest
from composer_path.checkpoints.newest import newest_whole
from composer_path.cli import main
from composer_path.config.files import check_files
from composer_path.config.reading import plain
from composer_path.run import place
from composer_path.storage import places, s3
from composer_path.storage.places import Folder
from composer_path.weights.tensor_file import read_tensor_file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Proxy]]:
    """The server's folder, in which objects are files, and a proxy before it."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with serve_s3(root, written=True) as port, pytest.MonkeyPatch.context() as patch:
        proxy = Proxy(port)
        proxy.start()
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**keys, "S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}.items():
            patch.setenv(name, value)
        yield root / "bucket", proxy
        proxy.stop()


@pytest.fixture
def bucket(server: tuple[Path, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A folder of checkpoints of steps 2 and 4 in the bucket, the server's folder of them, and the proxy."""
    root, proxy = server
    monkeypatch.setattr(places, "_PAUSES", (0.01, 0.01))
    folder = BucketFolder(f"s3://bucket/{tmp_path.name}/checkpoints", tmp_path / "here")
    for step in (2, 4):
        save(folder, step)
    yield folder, root / tmp_path.name / "checkpoints", proxy
    proxy.spoils.clear()


def save(folder: BucketFolder, step: int) -> None:
    staged = folder.staging(f"ep0-ba{step}")
    for name in (".metadata", "__0_0.distcp"):
        (staged / name).write_bytes(f"{name} of {step}".encode() * 100)
    place = Folder(staged)
    files = {name: place.digest(name) for name in place.files()}
    folder.send(f"ep0-ba{step}", staged, files)
    folder.publish(f"ep0-ba{step}", staged, Manifest("a_run", step, 0, files, {}))


def newest(folder: BucketFolder) -> str:
    found = newest_whole(folder)
    assert found is not None
    return found.path.name


# --- one that is there is whole --------------------------------------------------------------------------------------


def test_the_newest_is_brought_and_read_here(bucket: Any) -> None:
    folder, there, _ = bucket
    assert newest(folder) == "ep0-ba4" and (there / "latest").read_text() == "ep0-ba4"
    here = {path.name for path in (folder.path / "ep0-ba4").iterdir()}
    assert here == {".metadata", "__0_0.distcp"}
    folder.forget("ep0-ba4")
    assert not (folder.path / "ep0-ba4").exists() and (there / "ep0-ba4").exists()


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    bucket: Any, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, there, _ = bucket
    name = "ep0-ba4/__0_0.distcp"
    data = (there / name).read_bytes()
    if damage == "gone":
        folder.place.delete([name])
    else:
        folder.place.write(name, [b"X" + data[1:] if damage == "changed" else data[:-9]])
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == "ep0-ba2"
    assert f"{folder}/ep0-ba4 is damaged: __0_0.distcp" in caplog.text


def test_one_without_a_manifest_was_being_sent_and_is_cleared(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, there, _ = bucket
    folder.place.delete(["ep0-ba4/manifest.json"])
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == "ep0-ba2"
    assert "checkpoints/ep0-ba4 was not complete when its process ended" in caplog.text
    assert not (there / "ep0-ba4").exists()


def test_what_goes_loses_its_manifest_first(bucket: Any) -> None:
    folder, there, proxy = bucket
    first = len(proxy.requests)
    folder.remove("ep0-ba2")
    deleted = [line for line in proxy.requests[first:] if line.startswith("DELETE")]
    assert "manifest.json" in deleted[0] and len(deleted) == 3 and not (there / "ep0-ba2").exists()


def test_one_is_brought_with_its_manifest_by_its_name_or_by_a_link(bucket: Any) -> None:
    folder, _, _ = bucket
    assert folder.bring("ep0-ba2") == folder.path / "ep0-ba2"
    here = {path.name for path in folder.bring("latest").iterdir()}
    assert here == {".metadata", "__0_0.distcp", "manifest.json"}
    with pytest.raises(CheckpointError, match=r"no checkpoint at 's3://bucket/.*/ep0-ba3'; name a run"):
        folder.bring("ep0-ba3")
    folder.forget("ep0-ba4")
    folder.place.write("ep0-ba4/__0_0.distcp", [b"damaged"])
    with pytest.raises(CheckpointError, match=r"/ep0-ba4 is damaged: __0_0.distcp"):
        folder.bring("latest")


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["status:503", "reset"])
def test_a_fault_that_passes_costs_nothing(bucket: Any, how: str) -> None:
    folder, there, proxy = bucket
    proxy.spoils.append(Spoil("PUT .*distcp", how, times=1))
    save(folder, 6)
    proxy.spoils.append(Spoil("GET .*distcp", how, times=1))
    assert newest(folder) == "ep0-ba6" and (there / "latest").read_text() == "ep0-ba6"


def test_an_outage_is_an_error_and_never_an_earlier_checkpoint(bucket: Any) -> None:
    folder, _, proxy = bucket
    proxy.spoils.append(Spoil("GET .*ba4.*distcp", "status:503"))
    with pytest.raises(CheckpointError, match=r"ep0-ba4: can't be read: .*answer 503"):
        newest_whole(folder)


@pytest.mark.parametrize("file", ["__0_0.distcp", "manifest.json", "latest"])
def test_a_save_that_fails_leaves_the_earlier_ones(bucket: Any, file: str) -> None:
    folder, _, proxy = bucket
    proxy.spoils.append(Spoil(f"PUT .*{file}", "status:403"))
    with pytest.raises(OSError, match="can't write it, found answer 403"):
        save(folder, 6)
    proxy.spoils.clear()
    assert newest(folder) == ("ep0-ba6" if file == "latest" else "ep0-ba4")


def test_large_files_go_in_parts_and_a_part_that_fails_is_sent_again(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, there, proxy = bucket
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * 2**20)
    data = torch.randint(256, (12 * 2**20,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "large").write_bytes(data)
    proxy.spoils.append(Spoil("PUT .*partNumber=2", "status:503", times=1))
    folder.place.write_file("large", tmp_path / "large")
    assert (there / "large").read_bytes() == data
    assert sum("partNumber=2" in line for line in proxy.requests) == 2


def test_google_takes_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcs" / "bucket").mkdir(parents=True)
    with serve_gcs(tmp_path / "gcs") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        folder = BucketFolder("gs://bucket/run/checkpoints", tmp_path / "here")
        for step in (2, 4):
            save(folder, step)
        assert newest(folder) == "ep0-ba4" and folder.target("latest") == "ep0-ba4"
        folder.remove("ep0-ba4")
        assert newest(folder) == "ep0-ba2"


# --- a run -----------------------------------------------------------------------------------------------------------

MORE = ["eval_loader=null", "model.projector.weights=null", "trainer.save_interval=1ba", "trainer.max_duration=3ba"]


def test_a_run_in_a_bucket_goes_on_on_another_machine_and_leaves_everything_there(
    bucket: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, there, proxy = bucket
    caplog.set_level(logging.INFO)
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    whole, _ = run(load_tiny_config("finetune", shards, tmp_path / "local", MORE))
    expected = weights_of(whole)

    def on_machine(name: str, witness: Witness) -> Any:
        monkeypatch.setattr(place.tempfile, "tempdir", str(tmp_path / name))
        more = [*MORE, f"save_root=s3://bucket/{tmp_path.name}/runs"]
        return run(load_tiny_config("finetune", shards, tmp_path / "unused", more), witness)

    with pytest.raises(Interrupted):
        on_machine("a", Witness(2))
    proxy.spoils.append(Spoil("GET .*distcp", "cut:1000000", times=1))
    trainer, witness = on_machine("b", Witness())
    assert list(witness.losses) == [2]
    weights = weights_of(trainer)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    run_folder = there.parent / "runs" / "finetune"
    names = {path.name for path in run_folder.iterdir()}
    assert {"checkpoints", "config.yaml", "summary.json", "model", "runs"} <= names and ".lock" not in names
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} == {"ep1-ba3", "latest"}
    assert (run_folder / "model" / "model.safetensors").exists() and list((run_folder / "runs").rglob("events.*"))
    assert not list((tmp_path / "b").rglob("*.distcp"))  # what was brought and sent doesn't stay here
    expected_tensors = read_tensor_file(run_folder / "model" / "model.safetensors")
    address = f"s3://bucket/{tmp_path.name}/runs/finetune"
    on_machine("c", Witness())
    said = [record.getMessage() for record in caplog.records]
    assert f"goes on from {address}/checkpoints/ep0-ba2, after step 2" in said
    assert any(f"this run has ended before; its results lie in {address} (" in line for line in said)
    for meant in (f"{address}/", f"{address}/checkpoints/latest"):
        assert main(["export", meant, str(tmp_path / "exported")]) == 0
        exported = read_tensor_file(tmp_path / "exported" / "model.safetensors")
        assert exported.keys() == expected_tensors.keys()
        assert all(torch.equal(exported[name], value) for name, value in expected_tensors.items())


def test_the_next_stage_takes_its_projector_from_the_bucket(
    bucket: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = bucket
    root = str(folder).removesuffix("/checkpoints")
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    monkeypatch.setattr(place.tempfile, "tempdir", str(tmp_path / "temporary"))
    short = ["eval_loader=null", f"save_root={root}", "trainer.max_duration=1ba"]
    run(load_tiny_config("pretrain", shards, tmp_path, short))
    config = load_tiny_config(
        "finetune", shards, tmp_path, [*short, "trainer.save_interval=null", "trainer.autoresume=false"]
    )
    assert plain(config)["model"]["projector"]["weights"] == f"{root}/pretrain/projector.safetensors"
    assert check_files(plain(config)) == []
    _, witness = run(config)
    assert list(witness.losses) == [0]
    lost = {**plain(config), "save_root": "s3://bucket/no"}
    lost["model"]["projector"]["weights"] = "s3://bucket/no/projector.safetensors"
    assert "found no 's3://bucket/no/projector.safetensors'" in "".join(check_files(lost))
