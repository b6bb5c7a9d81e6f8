"""Claims about stored vision features: training on them is training on the images, and nothing else passes for it."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Witness, convert_shards, load_tiny_config, run

from composer_path.batches.batch import PackedCollator, split_batch
from composer_path.batches.dataset import ConversationDataset
from composer_path.cli import main
from composer_path.commands.verb import parse
from composer_path.config.reading import plain
from composer_path.images.features import FeaturesError, features_in_index
from composer_path.models.composer_model import ComposerPathMLLM
from composer_path.models.parameters import cast_parameters
from composer_path.planning.encoded_features import (
    FeatureEncoder,
    build_feature_encoder,
    check_features,
    encode_set,
)
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.columns import pack_images
from composer_path.shards.index import new_set, publish_new
from composer_path.shards.view import ShardView
from composer_path.storage.places import Folder
from composer_path.train import build_model
from composer_path.weights.vision_file import weights_hash

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's sets, and `encoded/train`, one of them with features."""
    root = tmp_path_factory.mktemp("encode")
    shards = convert_shards(root / "shards")
    view = ShardView(shards / "train")
    encode_set(view, str(root / "encoded" / "train"), build_feature_encoder(settings_of(root)), batch_size=5, workers=2)
    return root


def config_of(root: Path, *more: str, runs: str = "runs") -> Any:
    """Stage 2 without what changes images."""
    steps = ["trainer={max_duration: 3ba, eval_interval: 99ep, save_interval: 99ep}", "eval_loader=null"]
    calm = ["algorithms=null", "algorithms={}", "model.projector.weights=null"]
    return load_tiny_config("finetune", root / "shards", root / runs, [*calm, *steps, *more])


@functools.cache
def read_settings(root: Path) -> dict[str, Any]:
    return plain(config_of(root))


def settings_of(root: Path) -> dict[str, Any]:
    return copy.deepcopy(read_settings(root))


vocabulary = functools.cache(load_tokenizer)


def read(folder: Path, **keywords: Any) -> ConversationDataset:
    settings: dict[str, Any] = {"template": "llava_llama_2", "max_seq_len": 320, "batch_size": 4} | keywords
    tokenizer = vocabulary(REPO_ROOT / "test_data" / "tokenizer")
    model = {"num_image_tokens": 4, "image_size": 32, "pad_color": (127, 127, 127)}
    return ConversationDataset(local=str(folder), tokenizer=tokenizer, **model, **settings)


# --------------------------------------------------------------------------------------------------- what is stored


def test_only_the_images_differ_and_they_are_what_the_encoder_makes(root: Path) -> None:
    images, features = read(root / "shards" / "train"), read(root / "encoded" / "train")
    encoder = build_feature_encoder(settings_of(root))
    assert len(images) == len(features) == 24
    for index in range(24):
        one, other = images[index], features[index]
        for key in ("input_ids", "labels", "is_he"):
            assert torch.equal(one[key], other[key])
        assert (one["source"], one["problem"]) == (other["source"], other["problem"])
        assert "pixel_values" not in other and "image_features" not in one
        pixels, found = one["pixel_values"], other["image_features"]
        assert found.dtype == torch.bfloat16 and found.shape == (len(pixels), 5, 24)
        if len(pixels):
            assert (found.float() - encoder.encode(pixels).float()).abs().max() < 0.02  # other batches: bf16 rounding
    assert {len(features[index]["image_features"]) for index in range(24)} >= {0, 1}


def test_the_sets_tools_read_it(root: Path) -> None:
    before, after = ShardView(root / "shards" / "train"), ShardView(root / "encoded" / "train")
    assert len(after) == len(before) == 24
    assert after.card["features"]["dim"] == 24 and after.card["images"] == before.card["images"]
    assert after.sample(3).conversation == before.sample(3).conversation
    assert after.sample(3).metadata == before.sample(3).metadata


def one_sample_set(folder: Path, image: bytes) -> Path:
    with new_set(Folder(folder), 2**20, ["xxh64"]) as writer:
        for data in (image, (REPO_ROOT / "test_data" / "imgs" / "cmu_x1120_y1960_160.jpg").read_bytes()):
            turns = [["human", "<image>\nWhat is it?"], ["assistant", "A gland."]]
            conversation = {"turns": turns, "system": None}
            writer.write({"id": "a", "conversation": conversation, "images": pack_images([data]), "metadata": {}})
        publish_new(Folder(folder), writer, {})
    return folder


def test_an_image_that_cannot_be_decoded_stays_the_unusable_sample_it_was(root: Path, tmp_path: Path) -> None:
    folder = one_sample_set(tmp_path / "set", b"no image")
    summary = encode_set(ShardView(folder), str(tmp_path / "out"), build_feature_encoder(settings_of(root)))
    assert (summary.images, summary.undecodable) == (2, 1)
    before, after = read(folder)[0], read(tmp_path / "out")[0]
    assert before["problem"] == after["problem"] is not None
    assert len(after["image_features"]) == 0
    assert read(tmp_path / "out")[1]["problem"] is None


# ------------------------------------------------------------------------------------------------------- training


def loss_and_gradients(model: ComposerPathMLLM, dataset: Any, indices: list[int]) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    batch = PackedCollator(400)([dataset[index] for index in indices])
    loss = 0.0
    for part in split_batch(batch, 4):
        of_part = model.loss(model(part), part) * (part.loss_weight / batch.loss_weight)
        of_part.backward()
        loss += float(of_part)
    return loss, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.fixture(scope="module")
def sets(root: Path) -> tuple[ConversationDataset, ConversationDataset]:
    """Images, and features of the encoder in bf16, one image at a time."""
    encoder = build_feature_encoder(settings_of(root))
    cast_parameters(encoder.vision_encoder, torch.bfloat16)
    encode_set(ShardView(root / "shards" / "train"), str(root / "encoded" / "bf16"), encoder, batch_size=1)
    return read(root / "shards" / "train"), read(root / "encoded" / "bf16")


@pytest.mark.parametrize("indices", [[0], [20], [3, 21]])  # at most one image each, as they were encoded
def test_loss_and_gradients_are_exactly_those_of_images_where_the_encoder_is_in_bf16(
    indices: list[int], root: Path, sets: tuple[ConversationDataset, ConversationDataset]
) -> None:
    model = ComposerPathMLLM(build_model(settings_of(root)))
    cast_parameters(model.model.vision_encoder, torch.bfloat16)
    images, features = (loss_and_gradients(model, dataset, indices) for dataset in sets)
    assert images[0] == features[0]
    assert images[1].keys() == features[1].keys()
    assert all(torch.equal(images[1][name], features[1][name]) for name in images[1])


ERROR_OF_LOSS = 1e-5  # relative; measured: 4.8e-7
ERROR_OF_GRADIENTS = 1e-3  # of all gradients' norm; measured: 1.2e-4


def test_in_fp32_the_loss_differs_by_the_rounding_of_the_features(root: Path) -> None:
    model = ComposerPathMLLM(build_model(settings_of(root)))
    images, features = (
        loss_and_gradients(model, read(root / folder / "train"), list(range(24))) for folder in ("shards", "encoded")
    )
    assert 0 < abs(images[0] - features[0]) / images[0] < ERROR_OF_LOSS
    norm = sum(float(one.norm() ** 2) for one in images[1].values()) ** 0.5
    error = sum(float((images[1][name] - features[1][name]).norm() ** 2) for name in images[1]) ** 0.5
    assert error / norm < ERROR_OF_GRADIENTS


def test_the_vision_encoder_is_never_entered_and_text_still_gives_the_projector_a_gradient(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ComposerPathMLLM(build_model(settings_of(root)))
    monkeypatch.setattr(type(model.model.vision_encoder), "forward", None)
    dataset = read(root / "encoded" / "train")
    text_only = [index for index in range(24) if not len(dataset[index]["image_features"])][:2]
    assert len(text_only) == 2
    _, gradients = loss_and_gradients(model, dataset, text_only)
    of_projector = {name for name, _ in model.named_parameters() if "projector" in name}
    assert of_projector <= gradients.keys()
    assert all(not gradients[name].any() for name in of_projector)
    loss, gradients = loss_and_gradients(model, dataset, list(range(6)))
    assert loss > 0 and any(gradients[name].any() for name in of_projector)


def test_a_run_on_features_follows_the_run_on_images(root: Path) -> None:
    losses, images = [], []
    for name, folder in (("images", "shards"), ("features", "encoded")):
        local = root / folder / "train"
        _, witness = run(config_of(root, f"train_loader.dataset.local={local}", runs=f"runs-{name}"), Witness())
        losses.append(list(witness.losses.values()))
        images.append(witness.metrics["batch/images"])
    assert len(losses[0]) == 3
    assert images[0] == images[1] and sum(images[0]) > 10
    assert losses[0] == pytest.approx(losses[1], rel=ERROR_OF_LOSS * 10)
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=18", "differ from what this run would make in weights of the vision encoder; encode the images again"),
        ("train_loader.dataset.fit=crop", r"would make in fit \(pad stored, crop here\)"),
        (
            "model.vision_encoder.tokens=patches",
            r"would make in tokens \(all stored, patches here\), num_tokens \(5 stored, 4",
        ),
        ("model.trainable=[vision_encoder, projector]", "vision_encoder can't learn from"),
        (
            "algorithms={stain_jitter: {}}",
            "algorithms.stain_jitter changes images, and .*/encoded/train holds features",
        ),
    ],
)
def test_features_that_do_not_suit_a_run_end_it(override: str, message: str, root: Path) -> None:
    words = (f"train_loader.dataset.local={root / 'encoded' / 'train'}", override)
    with pytest.raises(FeaturesError, match=message):
        run(config_of(root, *words, runs="runs-refused"), Witness())


def test_an_encoder_is_known_in_any_dtype_and_any_other_weight_is_noticed(root: Path) -> None:
    encoder = build_feature_encoder(settings_of(root)).vision_encoder
    first = weights_hash(encoder)
    cast_parameters(encoder, torch.bfloat16)
    assert weights_hash(encoder) == first
    with torch.no_grad():
        next(iter(encoder.parameters())).view(-1)[0] += 1
    assert weights_hash(encoder) != first
    assert weights_hash(build_model(settings_of(root)).vision_encoder) == first


def test_features_whose_index_was_lost_are_no_images(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "encoded" / "train", tmp_path / "set")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    del index["features"]
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(FeaturesError, match=r"the shards hold features, but their index.json doesn't say so"):
        read(tmp_path / "set")[0]


def test_images_are_no_features(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "shards" / "train", tmp_path / "set")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    index["features"] = json.loads((root / "encoded" / "train" / "index.json").read_text())["features"]
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(FeaturesError, match="a set of features holds an image file"):
        read(tmp_path / "set")[0]


def test_a_run_without_features_is_asked_for_nothing(root: Path) -> None:
    trained = build_feature_encoder(settings_of(root)).vision_encoder.requires_grad_(True)
    check_features(read(root / "shards" / "train"), trained, ["stain_jitter"])
    with pytest.raises(FeaturesError):
        check_features(read(root / "encoded" / "train"), trained, [])


# -------------------------------------------------------------------------------------------------------- writing


def test_an_encoding_that_fails_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return original(self, pixels)

    original = FeatureEncoder.encode
    monkeypatch.setattr(FeatureEncoder, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_set(
            ShardView(root / "shards" / "train"), str(tmp_path / "out"), build_feature_encoder(settings_of(root)), 4
        )
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*"))


def words_of(root: Path, out: Path, *more: str, shards: str = "shards/train") -> list[str]:
    folder = out / "config"
    folder.mkdir(exist_ok=True)
    from omegaconf import OmegaConf

    OmegaConf.save(config_of(root), folder / "run.yaml")
    return [str(folder / "run.yaml"), str(root / shards), str(out / "out"), *more]


def test_the_command_writes_the_same_set_and_says_what_it_holds(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = words_of(root, tmp_path, "--batch-size", "5", "--workers", "1", "--device", "cpu")
    assert main(["encode", *words]) == 0
    assert "24 samples, 21 images, 0.000 GB of features" in capsys.readouterr().out
    for name in ("index.json", "part-00000/shard.00000.mds"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "encoded" / "train" / name).read_bytes()
    assert features_in_index((tmp_path / "out" / "index.json").read_bytes()) is not None
    assert main(["encode", *words]) == 2
    assert "must be empty, found files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shards", "more", "message"),
    [
        ("encoded/train", (), "holds features already"),
        ("nowhere", (), "must hold index.json"),
        ("shards/train", ("model.trainable=[vision_encoder]",), "vision_encoder learns in this run"),
    ],
)
def test_what_cannot_be_encoded_is_said_and_nothing_is_written(
    shards: str, more: tuple[str, ...], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["encode", *words_of(root, tmp_path, *more, shards=shards)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--workers", "0"], ["--batch-size", "0"]])
def test_wrong_arguments_end_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("encode", ["x.yaml", "in", "out", *words])
    assert ended.value.code == 2
