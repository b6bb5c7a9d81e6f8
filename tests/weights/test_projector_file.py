"""Projector files of all three kinds, and files that must not load."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer_path.models.projector import Projector
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.weights.projector_file import (
    CONFIG_KEY,
    ORIGIN_KEY,
    build_projector,
    from_reference_projector,
    load_projector_weights,
    read_projector_config,
    save_mm_projector,
    save_projector,
    to_reference_projector,
)
from composer_path.weights.projector_origin import origin_of
from composer_path.weights.tensor_file import WeightsError, read_metadata

REFERENCE_KEYS = {
    "attn_pool.query",
    "attn_pool.ln_k.weight",
    "attn_pool.ln_k.bias",
    "attn_pool.ln_q.weight",
    "attn_pool.ln_q.bias",
    "attn_pool.to_q.weight",
    "attn_pool.to_kv.weight",
    "attn_pool.to_out.weight",
    "ln.weight",
    "ln.bias",
    "proj.0.weight",
    "proj.0.bias",
    "proj.2.weight",
    "proj.2.bias",
}


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("this ran",)


def make(kind: str = "reference", **arguments: object) -> Projector:
    defaults = {"pooler": {"kind": kind, "dim": 16, "num_queries": 5, "num_heads": 4}, "mlp": {"depth": 2}}
    return build_projector(in_dim=24, out_dim=32, **(defaults | arguments))


def assert_same(ours: Projector, theirs: Projector, begin: str = "") -> None:
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value) == key.startswith(begin), key


def test_a_random_start_differs_from_one_with_a_file(tmp_path: Path) -> None:
    source = make()
    save_projector(tmp_path / "projector.safetensors", source)
    assert_same(make(weights=str(tmp_path / "projector.safetensors")), source)
    assert not torch.equal(make().pooler.query, source.pooler.query)


@pytest.mark.parametrize("kind", ["reference", "open_clip"])
def test_projector_safetensors_rebuilds_the_projector(tmp_path: Path, kind: str) -> None:
    source = make(kind)
    save_projector(tmp_path / "projector.safetensors", source)
    config = read_projector_config(tmp_path)
    assert config == source.config
    again = build_projector(**config, weights=str(tmp_path / "projector.safetensors"))
    assert_same(again, source)


def test_mm_projector_bin_has_the_references_names(tmp_path: Path) -> None:
    source = make()
    save_mm_projector(tmp_path / "mm_projector.bin", source)
    tensors = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert tensors.keys() == {f"model.mm_projector.{key}" for key in REFERENCE_KEYS}
    again = make()
    load_projector_weights(tmp_path / "mm_projector.bin", again)
    assert_same(again, source)


def test_gathered_tensors_may_be_written_in_the_projectors_stead(tmp_path: Path) -> None:
    gathered = {key: value + 1 for key, value in make().state_dict().items()}
    save_projector(tmp_path / "projector.safetensors", make(), gathered)
    save_mm_projector(tmp_path / "mm_projector.bin", make(), gathered)
    for name in ("projector.safetensors", "mm_projector.bin"):
        again = make(weights=str(tmp_path / name))
        assert all(torch.equal(again.state_dict()[key], value) for key, value in gathered.items())


def test_a_folder_stands_for_the_projector_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds neither"):
        make(weights=str(tmp_path))
    source = make()
    save_mm_projector(tmp_path / "mm_projector.bin", source)
    assert_same(make(weights=str(tmp_path)), source)


def test_an_identity_has_a_file_too(tmp_path: Path) -> None:
    identity = build_projector(in_dim=24, out_dim=24, type="identity")
    save_projector(tmp_path / "projector.safetensors", identity)
    save_mm_projector(tmp_path / "mm_projector.bin", identity)
    for name in ("projector.safetensors", "mm_projector.bin"):
        load_projector_weights(tmp_path / name, identity)


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector.", "module.model.mm_projector."])
def test_any_prefix_is_taken_off(tmp_path: Path, prefix: str) -> None:
    source = make()
    torch.save(to_reference_projector(source.state_dict(), prefix), tmp_path / "p.bin")
    assert_same(make(weights=str(tmp_path / "p.bin")), source)


@pytest.mark.parametrize("arguments", [{"mlp": {"depth": 1}}, {"pooler": None, "mlp": {"depth": 1}}, {"pooler": None}])
def test_other_projectors_make_the_round_trip_through_the_references_names(tmp_path: Path, arguments: dict) -> None:
    source = make(**arguments)
    save_mm_projector(tmp_path / "mm_projector.bin", source)
    assert_same(make(weights=str(tmp_path), **arguments), source)
    tensors = to_reference_projector(source.state_dict(), "")
    assert from_reference_projector(tensors).keys() == source.state_dict().keys()


def test_a_linear_layer_is_read_under_either_name(tmp_path: Path) -> None:
    source = make(mlp={"depth": 1})
    tensors = to_reference_projector(source.state_dict(), "")
    assert "proj.weight" in tensors
    renamed = {key.replace("proj.", "proj.0."): value for key, value in tensors.items()}
    torch.save(renamed, tmp_path / "p.bin")
    assert_same(make(mlp={"depth": 1}, weights=str(tmp_path / "p.bin")), source)


def assert_pooler_only(ours: Projector, theirs: Projector) -> None:
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value) != key.startswith("mlp."), key


@pytest.mark.parametrize("prefix", ["", "mm_projector."])
def test_coca_start_weights_have_a_key_of_their_own_and_leave_the_mlp_random(tmp_path: Path, prefix: str) -> None:
    source = make()
    tensors = to_reference_projector(source.state_dict(), prefix)
    start = {key: value for key, value in tensors.items() if "proj." not in key.removeprefix(prefix)}
    torch.save(start, tmp_path / "c.pth")
    assert_pooler_only(make(pooler_weights=str(tmp_path / "c.pth")), source)
    with pytest.raises(WeightsError, match=r"without its MLP; give it as model\.projector\.pooler_weights"):
        make(weights=str(tmp_path / "c.pth"))


def test_a_whole_projector_is_no_pooler_and_both_keys_at_once_are_refused(tmp_path: Path) -> None:
    save_mm_projector(tmp_path / "mm_projector.bin", make())
    whole = str(tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match=r"holds an MLP too; give it as model\.projector\.weights"):
        make(pooler_weights=whole)
    with pytest.raises(ValueError, match="found weights and pooler_weights"):
        make(pooler_weights=whole, weights=whole)
    with pytest.raises(WeightsError, match="this projector has no pooler"):
        make(pooler=None, pooler_weights=whole)


@pytest.mark.parametrize("pooler, ln", [("attn_pool_caption.", "ln_caption."), ("attn_pool.", "ln_post.")])
def test_the_pooler_of_a_whole_conch_or_open_clip_checkpoint_is_taken(tmp_path: Path, pooler: str, ln: str) -> None:
    source = make("open_clip")
    names = {"attn_pool.": "visual." + pooler, "ln.": "visual." + ln}
    whole = {"text.cls_emb": torch.zeros(3), "visual.trunk.cls_token": torch.zeros(3), "logit_scale": torch.zeros(())}
    for key, value in to_reference_projector(source.state_dict(), "").items():
        part = next((part for part in names if key.startswith(part)), None)
        if part is not None:
            whole[names[part] + key.removeprefix(part)] = value
    torch.save(whole, tmp_path / "pytorch_model.bin")
    assert_pooler_only(make("open_clip", pooler_weights=str(tmp_path / "pytorch_model.bin")), source)


def test_the_word_embeddings_of_mm_use_im_start_end_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make()
    tensors = to_reference_projector(source.state_dict()) | {"model.embed_tokens.weight": torch.zeros(8, 32)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with caplog.at_level(logging.WARNING):
        assert_same(make(weights=str(tmp_path)), source)
    assert "mm_use_im_start_end" in caplog.text and "model.projector.image_marks: true" in caplog.text


@pytest.mark.parametrize("rows", [2, 8])
def test_marks_around_images_are_read_from_the_last_words_that_mm_use_im_start_end_left(
    tmp_path: Path, rows: int
) -> None:
    """LLaVA writes the whole embedding, and reads either."""
    words = torch.randn(rows, 32)
    torch.save(to_reference_projector(make().state_dict()) | {"model.embed_tokens.weight": words}, tmp_path / "p.bin")
    marked = make(weights=str(tmp_path / "p.bin"), image_marks=True)
    assert torch.equal(marked.marks, words[-2:])


def test_marks_around_images_stand_in_both_files_and_are_missed_where_they_are_not(tmp_path: Path) -> None:
    marked = make(image_marks=True)
    marked.marks.data.normal_()
    save_projector(tmp_path / "projector.safetensors", marked)
    save_mm_projector(tmp_path / "mm_projector.bin", marked)
    assert torch.equal(
        torch.load(tmp_path / "mm_projector.bin", weights_only=True)["model.embed_tokens.weight"], marked.marks
    )
    for name in ("projector.safetensors", "mm_projector.bin"):
        assert_same(make(weights=str(tmp_path / name), image_marks=True), marked)
    with pytest.raises(WeightsError, match="image_marks: the file has True, the model None"):
        make(weights=str(tmp_path / "projector.safetensors"))
    torch.save(to_reference_projector(make().state_dict()), tmp_path / "plain.bin")
    with pytest.raises(WeightsError, match=r"missing \(1\): marks"):
        make(weights=str(tmp_path / "plain.bin"), image_marks=True)
    pooler = {key: value for key, value in make().state_dict().items() if not key.startswith("mlp.")}
    torch.save(to_reference_projector(pooler), tmp_path / "coca.bin")
    make(pooler_weights=str(tmp_path / "coca.bin"), image_marks=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drop": "attn_pool.to_q.weight"}, r"missing \(1\): pooler.to_q.weight"),
        ({"drop": "ln.bias"}, r"missing \(1\): ln.bias"),
        ({"drop": "proj.2.bias"}, r"missing \(1\): mlp.2.bias"),
        ({"add": "attn_pool.to_q.bias"}, r"left over \(1\): pooler.to_q.bias"),
        ({"add": "something"}, r"left over \(1\): something"),
        ({"reshape": "attn_pool.query"}, r"pooler.query: the file has \[3\], the model \[5, 16\]"),
    ],
)
def test_keys_and_shapes_that_differ_are_listed(tmp_path: Path, change: dict, message: str) -> None:
    tensors = to_reference_projector(make().state_dict())
    for action, key in change.items():
        if action == "drop":
            del tensors[f"model.mm_projector.{key}"]
        else:
            tensors[f"model.mm_projector.{key}"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match=message):
        make(weights=str(tmp_path))


def test_start_weights_lack_the_mlp_only(tmp_path: Path) -> None:
    tensors = to_reference_projector(make().state_dict(), "")
    start = {k: v for k, v in tensors.items() if not k.startswith("proj.")}
    torch.save({k: v for k, v in start.items() if k.startswith("attn_pool.")}, tmp_path / "c.bin")
    with pytest.raises(WeightsError, match=r"missing \(2\): ln.bias, ln.weight"):
        make(pooler_weights=str(tmp_path / "c.bin"))
    torch.save(start | {"visual.norm.weight": torch.zeros(1)}, tmp_path / "c.bin")
    with pytest.raises(WeightsError, match=r"Left over beside the pooler.*visual.norm.weight"):
        make(pooler_weights=str(tmp_path / "c.bin"))


def test_a_file_with_another_config_is_refused_even_where_shapes_agree(tmp_path: Path) -> None:
    save_projector(tmp_path / "projector.safetensors", make())
    with pytest.raises(WeightsError, match=r"another projector.*'num_heads': 4.*'num_heads': 8"):
        make(pooler={"dim": 16, "num_queries": 5, "num_heads": 8}, weights=str(tmp_path))


def test_a_pickle_that_holds_objects_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model.mm_projector.ln.bias": Harmful()}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="could run code and are refused"):
        make(weights=str(tmp_path))
    assert "this ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no file"):
        make(weights=str(tmp_path / "absent.bin"))
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"must end with \.safetensors"):
        make(weights=str(tmp_path / "weights.npz"))
    for name in ("cut.bin", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(WeightsError, match=r"can't be read|must be tensors in plain dicts"):
            make(weights=str(tmp_path / name))
    torch.save({"epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(WeightsError, match="found other things under epoch"):
        make(weights=str(tmp_path / "state.pth"))


def test_the_golden_projector_is_read_from_a_whole_models_tensors(golden: Path, tmp_path: Path) -> None:
    whole = load_file(golden / "model" / "model.safetensors")
    prefix = "model.mm_projector."
    torch.save({key: value for key, value in whole.items() if key.startswith(prefix)}, tmp_path / "mm_projector.bin")
    projector = build_projector(in_dim=64, out_dim=64, pooler={"dim": 48}, weights=str(tmp_path))
    back = to_reference_projector(projector.state_dict())
    assert {key.removeprefix(prefix) for key in back} == REFERENCE_KEYS
    assert all(torch.equal(value, whole[key]) for key, value in back.items())


# --- which encoder a file belongs to ---------------------------------------------------------------------------------

ENCODER = {"name": "timm/vit_tiny_patch16_224", "image_size": 32}
KWARGS = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def encoder(seed: int = 3, **changes: Any) -> VisionEncoder:
    torch.manual_seed(seed)
    return untrained_vision_encoder(**(ENCODER | {"kwargs": KWARGS} | changes))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A file of a projector that was trained with `encoder()`."""
    source, file = make(), tmp_path / "projector.safetensors"
    save_projector(file, source, origin=origin_of(source, encoder(), {"name": "plain"}))
    return file


def test_a_file_says_with_which_encoder_and_template_it_was_trained(trained: Path) -> None:
    origin = json.loads(read_metadata(trained)[ORIGIN_KEY])
    assert origin["encoder"] == json.loads(json.dumps(encoder().config))
    assert (origin["num_tokens"], origin["num_image_tokens"], origin["template"]) == (5, 5, {"name": "plain"})
    assert len(origin["weights"]) == 16


def test_a_file_is_taken_by_the_encoder_it_was_trained_with_in_any_dtype(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first = make(weights=str(trained), vision_encoder=encoder())
        again = make(weights=str(trained), vision_encoder=encoder().to(torch.bfloat16))
    assert_same(first, again)
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": 48},
            r"vision_encoder\.image_size: the file has 32, the model 48; num_tokens: the file has 5, .*10",
        ),
        ({"tokens": "patches"}, r"vision_encoder\.tokens: the file has all, the model patches"),
        ({"name": "timm/vit_small_patch16_224"}, r"name: the file has timm/vit_tiny.*, the model timm/vit_small"),
        ({"kwargs": KWARGS | {"depth": 2}}, r"kwargs: the file has .*'depth': 1.* the model .*'depth': 2"),
        ({"mean": [0.4, 0.5, 0.6]}, r"vision_encoder\.mean: the file has \[0\.5, .* the model \[0\.4"),
        ({"seed": 4}, r"the file has weights of hash [0-9a-f]{16}, the model [0-9a-f]{16}; take the encoder"),
    ],
)
def test_another_encoder_is_refused_with_both_values(trained: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        make(weights=str(trained), vision_encoder=encoder(**changes))


@pytest.mark.parametrize("kind", ["reference", "earlier version"])
def test_a_file_that_does_not_say_its_encoder_is_taken_with_one_line(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = make()
    if kind == "reference":
        save_mm_projector(tmp_path / "mm_projector.bin", source)
    else:
        save_projector(tmp_path / "projector.safetensors", source)
    with caplog.at_level(logging.WARNING):
        assert_same(make(weights=str(tmp_path), vision_encoder=encoder()), source)
    (record,) = caplog.records
    assert "doesn't say which vision encoder it was trained with" in record.getMessage()


@pytest.mark.parametrize("part", ["pooler.", "ln.", "mlp."])
def test_a_file_that_lacks_one_of_its_parts_is_refused_though_all_else_agrees(trained: Path, part: str) -> None:
    tensors = {key: value for key, value in load_file(trained).items() if not key.startswith(part)}
    save_file(tensors, trained, metadata=read_metadata(trained))
    with pytest.raises(WeightsError, match=rf"missing \(\d\): {part}"):
        make(weights=str(trained), vision_encoder=encoder())


@pytest.mark.parametrize("value", ["{", "[]", "{}", "null", "3", '{"encoder": 1}'])
@pytest.mark.parametrize("key", [CONFIG_KEY, ORIGIN_KEY])
def test_what_a_damaged_file_says_of_itself_is_one_error(trained: Path, key: str, value: str) -> None:
    save_file(load_file(trained), trained, metadata=read_metadata(trained) | {key: value})
    with pytest.raises(WeightsError, match=r"can't be read|is of another projector") as caught:
        make(weights=str(trained), vision_encoder=encoder())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_file_with_one_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    source = make()
    with torch.no_grad():
        source.mlp[2].weight[3, 1] = value
    save_mm_projector(tmp_path / "mm_projector.bin", source)
    with pytest.raises(WeightsError, match=r"with NaN or infinity \(1\): mlp\.2\.weight$"):
        make(weights=str(tmp_path))
    with pytest.raises(WeightsError, match=r"isn't written: 1 tensors hold NaN or infinity: mlp\.2\.weight"):
        save_projector(tmp_path / "projector.safetensors", source)
    assert not (tmp_path / "projector.safetensors").exists()
