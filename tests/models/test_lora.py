"""LoRA: what learns, that merging changes no logit, and that stock peft reads what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_problems import problems_of
from tiny_run import REPO_ROOT, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path import PathMLLM
from composer_path.models.lora import is_adapter, merged
from composer_path.planning.plan import Machine, SampleSize, make_plan
from composer_path.run.export import export_checkpoint, write_adapters
from composer_path.weights.assembly import assemble_model

peft = pytest.importorskip("peft", reason="peft isn't installed (composer_path[lora])")
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "vocab_size": 96}
LLM = {"r": 4, "lora_alpha": 16}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
KINDS |= {"some": {"target_modules": ["q_proj", "v_proj"]}}
OF_VISION: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS} | {"some": {"target_modules": ["qkv"]}}


def build(lora: dict[str, Any], dtype: torch.dtype = torch.float32, vision: Any = None, empty: bool = False) -> Any:
    vision = vision or {"name": "timm/vit_tiny_patch16_224", "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2}}
    return assemble_model(
        vision_encoder={"image_size": 32, **vision},
        projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
        language_model={"config": LLAMA},
        trainable=["projector"],
        lora=lora,
        frozen_dtype=dtype,
        empty=empty,
    )


def learn(model: Any) -> Any:
    """Adapters begin by adding nothing; let them add something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_logits_of_the_unmerged_model(kind: str) -> None:
    model = learn(build({"language_model": LLM | KINDS[kind], "vision_encoder": LLM | KINDS[kind] | OF_VISION[kind]}))
    plain = build({})
    assert merged(model, model.state_dict()).keys() == plain.state_dict().keys()
    plain.load_state_dict(merged(model, model.state_dict()))
    ids, images = torch.arange(20)[None], torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        (before, after), (ours, theirs) = (
            (model.language_model(ids).logits, plain.language_model(ids).logits),
            (model.vision_encoder(images), plain.vision_encoder(images)),
        )
        start = build({}).language_model(ids).logits
    assert (before - after).abs().max() < 1e-5 and (ours - theirs).abs().max() < 1e-5  # measured 7e-6 and 3e-6
    assert (before - start).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_reads_the_written_folder(tmp_path: Path, kind: str) -> None:
    model = learn(build({"language_model": LLM | KINDS[kind]}))
    write_adapters(tmp_path, model, model.state_dict())
    assert [folder.name for folder in tmp_path.iterdir()] == ["language_model"]
    stock = peft.PeftModel.from_pretrained(build({}).language_model, str(tmp_path / "language_model"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (stock(ids).logits - model.language_model(ids).logits).abs().max() < 1e-5
    assert str(REPO_ROOT) not in json.dumps(json.loads((tmp_path / "language_model/adapter_config.json").read_text()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_stock_peft_puts_the_adapters_on_a_vision_encoder(tmp_path: Path, kind: str) -> None:
    model = learn(build({"vision_encoder": LLM | KINDS[kind]}))
    write_adapters(tmp_path, model, model.state_dict())
    assert [folder.name for folder in tmp_path.iterdir()] == ["vision_encoder"]
    plain = build({}).vision_encoder
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = plain(images)
        stock = peft.PeftModel.from_pretrained(plain, str(tmp_path / "vision_encoder"))
        ours = model.vision_encoder(images)
        assert (stock(images) - ours).abs().max() < 1e-5 < 1e-2 < (before - ours).abs().max()
        assert (stock.merge_and_unload()(images) - ours).abs().max() < 1e-5


def test_adapters_alone_learn_in_fp32_beside_weights_in_the_compute_dtype() -> None:
    model = build({"language_model": LLM}, torch.bfloat16)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("projector.")}
    assert trained and all(is_adapter(name) for name in trained)
    assert {p.dtype for name, p in model.language_model.named_parameters() if is_adapter(name)} == {torch.float32}
    assert {p.dtype for name, p in model.language_model.named_parameters() if not is_adapter(name)} == {torch.bfloat16}
    assert sum(model.fsdp_wrap_fn(module) for module in model.modules()) == 2 * 14 + 2 + 2 + 2
    dora = build({"language_model": LLM | {"use_dora": True}}, torch.bfloat16)
    blocks = dora.language_model.model.layers
    assert {p.dtype for p in blocks.parameters()} == {torch.float32}


def test_adapters_begin_alike_on_ranks_that_start_empty_and_with_the_same_numbers_each_time() -> None:
    one, two = build({"language_model": LLM}), build({"language_model": LLM})
    empty = build({"language_model": LLM}, empty=True)
    assert all(torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in one.state_dict())
    assert all(p.is_meta for p in empty.parameters()) and empty.state_dict().keys() == one.state_dict().keys()


def test_attention_that_reads_its_weights_past_their_layers_gets_no_adapter() -> None:
    vision = {"name": "open_clip/ViT-B-32", "kwargs": {"layers": 1, "width": 64, "head_width": 32}}
    names = [name for name, _ in build({"vision_encoder": LLM}, vision=vision).named_parameters() if is_adapter(name)]
    assert names and not any("attn" in name for name in names)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [({"target_modules": ["q_pro"]}, "did you mean q_proj?"), ({"target_modules": ["lm_head"]}, "no linear layer")],
)
def test_a_target_that_is_nowhere_is_named(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.language_model\.target_modules") as error:
        build({"language_model": LLM | keywords})
    assert said in str(error.value)


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_run_of_adapters_goes_on_exactly_keeps_only_them_and_exports_the_merged_model(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: str
) -> None:
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    own = json.dumps(LLM | {"lora_dropout": 0.1} | KINDS[kind])
    words = [
        "model.projector.weights=null",
        "model.trainable=[projector]",
        f"model.lora={{language_model: {own}, vision_encoder: {own}}}",
        "trainer.save_interval=1ba",
    ]
    undisturbed, seen = run(load_tiny_config("finetune", shards, tmp_path / "undisturbed", words))
    stopped = Witness(stop_after=2)
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path / "stopped", words), stopped)
    config = load_tiny_config("finetune", shards, tmp_path / "stopped", words)
    trainer, resumed = run(config)
    assert stopped.losses | resumed.losses == seen.losses
    whole, again = weights_of(undisturbed), weights_of(trainer)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(whole[name].abs().max() > 0 for name in whole if ".lora_B." in name)

    from torch.distributed.checkpoint import FileSystemReader

    latest = (tmp_path / "stopped" / "finetune" / "checkpoints" / "latest").resolve()
    stored = FileSystemReader(str(latest)).read_metadata().state_dict_metadata
    held = {name.removeprefix("state.model.model.") for name in stored if name.startswith("state.model.")}
    assert held == {name for name in whole if is_adapter(name) or name.startswith("projector.")}

    left = PathMLLM.from_pretrained(tmp_path / "stopped" / "finetune" / "model").state_dict()
    export_checkpoint(latest, config, tmp_path / "exported")
    exported = PathMLLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(left[name], exported[name]) for name in left)
    assert (tmp_path / "exported" / "adapters" / "language_model" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "stopped" / "finetune" / "adapters" / "vision_encoder" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.lora={language_model: {r: 4}}"], "model.lora.language_model: stands beside weights that stay frozen"),
        (["model.lora={language_model: {rank: 4}}"], "model.lora.language_model.rank: unknown key"),
        (["model.lora={projector: {r: 4}}"], "model.lora.projector: unknown key"),
        (["model.lora={vision_encoder: {r: 0}}"], "model.lora.vision_encoder.r: found 0; it must be at least 1"),
        (["model.lora={vision_encoder: {lora_dropout: 1.0}}"], "it must be at least 0 and below 1"),
        (["model.trainable=[]", "model.lora={}"], "model.trainable: found an empty list"),
        (
            ["model.lora={vision_encoder: {r: 4}}", "optimizer.lr={projector: 1.0, language_model: 1.0}"],
            "optimizer.lr.vision_encoder: is missing",
        ),
    ],
)
def test_what_a_yaml_says_of_adapters_is_checked(overrides: list[str], said: str) -> None:
    problems = problems_of(REPO_ROOT / "yamls" / "demo" / "finetune.yaml", *overrides)
    assert any(said in problem for problem in problems), problems


def test_without_peft_a_yaml_with_adapters_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer_path.config.agreement.has_peft", lambda: False)
    yaml = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
    (problem,) = problems_of(yaml, "model.lora={vision_encoder: {r: 4}}")
    assert problem.startswith("model.lora: needs the package peft")


def test_a_run_of_adapters_can_be_planned(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    words = ["model.projector.weights=null", "model.trainable=[projector]"]
    sizes = []
    for lora in ("null", "{language_model: {r: 4}}", "{language_model: {r: 4, use_dora: true}}"):
        config = load_tiny_config("finetune", shards, tmp_path, [*words, f"model.lora={lora}"])
        sizes.append(make_plan(config, Machine(1, 80e9, 989e12), SampleSize(100, 20, 1)).standing.total)
    assert sizes[0] < sizes[1] < sizes[2]
