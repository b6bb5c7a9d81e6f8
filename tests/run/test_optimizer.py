"""AdamW's groups: which parameters decay, and at which rate each module learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from config_problems import problems_of
from tiny_run import REPO_ROOT, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path import PathMLLM
from composer_path.config.reading import load_config, plain
from composer_path.run.optimizer import build_optimizer, count_parameters, describe_parameters
from composer_path.train import build_model
from composer_path.weights.assembly import assemble_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def model_with(trainable: list[str], **language_model: Any) -> PathMLLM:
    return assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
        language_model={"config": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2, **language_model}},
        trainable=trainable,
    )


def groups_by_name(model: PathMLLM, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The group of each parameter by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_biases_and_norms_never_decay_and_matrices_do() -> None:
    model = model_with(["projector", "language_model"])
    groups = groups_by_name(model, build_optimizer(model, lr=1e-3, weight_decay=0.1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(groups) == set(trained)
    decaying = {name for name, group in groups.items() if group["weight_decay"] == 0.1}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.1}
    assert decaying == {name for name, p in trained.items() if p.ndim > 1}
    still = set(groups) - decaying
    assert "language_model.model.layers.0.self_attn.q_proj.bias" in still
    assert "language_model.model.norm.weight" in still and "projector.ln.weight" in still
    assert "projector.pooler.query" in decaying and "language_model.lm_head.weight" in decaying


def test_each_parameter_is_in_one_group_also_where_embeddings_are_tied() -> None:
    model = model_with(["projector", "language_model"], tie_word_embeddings=True)
    optimizer = build_optimizer(model, lr=1e-3)
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == sum(1 for p in model.parameters() if p.requires_grad)


def test_each_module_learns_at_its_own_rate() -> None:
    model = model_with(["projector", "language_model"])
    optimizer = build_optimizer(model, lr={"projector": 2e-3, "language_model": 2e-5})
    rates = {name.split(".")[0]: group["lr"] for name, group in groups_by_name(model, optimizer).items()}
    assert rates == {"projector": 2e-3, "language_model": 2e-5}


def test_only_what_is_trained_has_optimizer_state() -> None:
    model = model_with(["projector"])
    optimizer = build_optimizer(model, lr=1e-3)
    assert {name.split(".")[0] for name in groups_by_name(model, optimizer)} == {"projector"}


def test_keywords_reach_adamw() -> None:
    model = model_with(["projector"])
    optimizer = build_optimizer(model, lr=1e-3, betas=[0.8, 0.9], eps=1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert all(group["fused"] == torch.cuda.is_available() for group in optimizer.param_groups)


def test_a_trained_module_without_a_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no learning rate for the trained module 'language_model'"):
        build_optimizer(model_with(["projector", "language_model"]), lr={"projector": 1e-3})


def test_a_model_of_which_nothing_is_trained_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model_with([]), lr=1e-3)


@pytest.mark.usefixtures("without_type_checks")
def test_another_optimizers_name_is_an_error() -> None:
    with pytest.raises((ValueError, TypeError), match="sgdz"):  # tests check annotations, too
        build_optimizer(model_with(["projector"]), name="sgdz", lr=1e-3)


def test_trained_and_frozen_parameters_are_counted_apart() -> None:
    model = model_with(["projector"])
    counts = count_parameters(model)
    assert counts["trained"] == sum(p.numel() for p in model.projector.parameters())
    assert counts["trained"] + counts["frozen"] == sum(p.numel() for p in model.parameters())


def test_what_is_trained_and_what_is_frozen_is_told_with_numbers_and_dtypes() -> None:
    model = model_with(["projector"])
    model.vision_encoder.to(torch.bfloat16)
    told = describe_parameters(model)
    projector, vision, language = (
        sum(p.numel() for p in module.parameters())
        for module in (model.projector, model.vision_encoder, model.language_model)
    )
    assert told == (
        f"trained: projector ({projector:,} weights); frozen: vision_encoder ({vision:,} weights, bfloat16), "
        f"language_model ({language:,} weights, float32)"
    )


def test_the_keywords_of_8_bit_moments_are_checked_though_their_signature_has_no_types() -> None:
    pytest.importorskip("torchao")
    eight = ["optimizer=null", "optimizer={name: adamw_8bit, lr: 2.0e-3, block_size: 512, betas: [0.8, 0.9]}"]
    demo = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
    assert load_config(demo, eight).optimizer.block_size == 512
    (problem,) = problems_of(demo, *eight, "optimizer.block_size=many")
    assert problem.startswith("optimizer.block_size: found the text 'many'; it must be a whole number")


# ------------------------------------------------------------------------------------------- by pattern and by depth

BOTH = ["projector", "language_model"]


def test_a_group_has_its_own_rate_decay_and_warm_up_and_the_first_that_matches_counts() -> None:
    model = model_with(BOTH)
    own = [
        {"match": "language_model.layers.1.*", "lr": 1e-5, "weight_decay": 0.1, "t_warmup": "5ba"},
        {"match": "language_model.layers.[0-1].mlp", "lr": 3e-5},
    ]
    groups = groups_by_name(model, build_optimizer(model, lr=1e-3, groups=own))
    upper, lower = (groups[f"language_model.model.layers.{at}.mlp.up_proj.weight"] for at in (1, 0))
    assert (upper["lr"], upper["weight_decay"], upper["t_warmup"]) == (1e-5, 0.1, "5ba")
    assert (lower["lr"], lower["weight_decay"], "t_warmup" in lower) == (3e-5, 0.0, False)
    assert groups["language_model.model.layers.1.input_layernorm.weight"]["weight_decay"] == 0.0
    assert groups["language_model.model.layers.0.self_attn.q_proj.weight"]["lr"] == 1e-3
    assert set(groups) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("matches", "said"),
    [
        (["vision_encoder.blocks.0"], r"groups\[0\].match: nothing of 'vision_encoder.blocks.0' is trained"),
        (["projector", "projector.mlp"], r"groups\[1\].match: all of 'projector.mlp' belongs to groups before it"),
        (["language_model.layer.1"], "did you mean language_model.layers"),
    ],
)
def test_a_group_that_would_be_empty_is_an_error(matches: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_optimizer(model_with(BOTH), lr=1e-3, groups=[{"match": match, "lr": 1e-4} for match in matches])


def test_rates_fall_from_block_to_block_towards_the_embeddings() -> None:
    model = model_with(["vision_encoder", *BOTH])
    groups = groups_by_name(model, build_optimizer(model, lr=1.0, layer_wise_lr_decay=0.5))
    expected = {"lm_head": 1.0, "model.norm": 1.0, "model.layers.1": 0.5, "model.layers.0": 0.25}
    expected = {f"language_model.{name}": rate for name, rate in (expected | {"model.embed_tokens": 0.125}).items()}
    trunk = {"norm": 1.0, "blocks.1": 0.5, "blocks.0": 0.25}
    trunk |= dict.fromkeys(("patch_embed", "pos_embed", "cls_token"), 0.125)
    expected |= {f"vision_encoder.trunk.{name}": rate for name, rate in trunk.items()} | {"projector": 1.0}
    for name, group in groups.items():
        (rate,) = {rate for start, rate in expected.items() if f"{name}.".startswith(f"{start}.")}
        assert group["lr"] == rate, name


def test_a_decay_without_blocks_does_nothing_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_wise_lr_decay: found 0\.9, but no block is trained"):
        build_optimizer(model_with(["projector"]), lr=1.0, layer_wise_lr_decay=0.9)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("[{match: projector, rate: 1.0}]", "unknown key 'rate'"),
        ("[{match: projector}]", "give lr, weight_decay or t_warmup"),
        ("[{lr: 1.0}]", "match: found None"),
        ("[{match: projecter, lr: 1.0}]", "did you mean projector?"),
        ("[{match: projector, lr: -1.0}]", "lr: found -1.0; it must be a number, at least 0"),
        ("[{match: projector, t_warmup: 3 weeks}]", "which is no time"),
        ("[{match: vision_encoder, lr: 1.0}]", "which is not trained; there are projector, language_model"),
        ("{projector: 1.0}", "it must be a list"),
    ],
)
def test_a_group_of_a_yaml_is_checked_before_anything_is_built(override: str, said: str) -> None:
    problems = problems_of(REPO_ROOT / "yamls" / "demo" / "finetune.yaml", f"optimizer.groups={override}")
    assert len(problems) == 1 and problems[0].startswith("optimizer.groups") and said in problems[0]


@pytest.mark.slow
def test_part_of_a_model_learns_at_rates_of_its_own_and_goes_on_exactly_after_a_stop(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under FSDP2, with one block's attention alone trained of the language model, in a unit with frozen weights."""
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    parts = [
        "model.projector.weights=null",
        "model.trainable=[projector, language_model.layers.1.self_attn]",
        "optimizer.groups=[{match: projector.mlp, lr: 1.0e-3, t_warmup: 4ba}]",
        "optimizer.layer_wise_lr_decay=0.5",
        "trainer.save_interval=1ba",
    ]
    undisturbed, seen = run(load_tiny_config("finetune", shards, tmp_path / "undisturbed", parts))
    told = capsys.readouterr().err
    assert "of them trained" in told and "projector.mlp" in told and "warm-up 4ba" in told
    # What the numbers in metrics stand for is told at the start.
    groups, lines = undisturbed.state.optimizers[0].param_groups, re.findall(r"^group(\d+): ([\w.]+),", told, re.M)
    assert [(int(number), name) for number, name in lines] == [(at, one["name"]) for at, one in enumerate(groups)]
    logged = {key: rates[-1] for key, rates in seen.metrics.items() if key.startswith("lr-")}
    assert logged == {f"lr-AdamW/group{at}": pytest.approx(one["lr"]) for at, one in enumerate(groups)}
    stopped = Witness(stop_after=2)
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path / "stopped", parts), stopped)
    trainer, resumed = run(load_tiny_config("finetune", shards, tmp_path / "stopped", parts))
    assert stopped.losses | resumed.losses == seen.losses
    whole, again = weights_of(undisturbed), weights_of(trainer)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    start = build_model(plain(load_tiny_config("finetune", shards, tmp_path / "start", parts))).state_dict()
    moved = {name for name, weight in whole.items() if not torch.equal(weight, start[name].to(weight.dtype))}
    assert {name for name in moved if not name.startswith("projector.")} == {
        f"language_model.model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"
    }
    written = PathMLLM.from_pretrained(tmp_path / "undisturbed" / "finetune" / "model").state_dict()
    # All rows but the image token's, which a folder has besides.
    assert all(torch.equal(written[name][: len(whole[name])], whole[name].to(written[name].dtype)) for name in whole)
    rates = {group["name"]: group["initial_lr"] for group in trainer.state.optimizers[0].param_groups}
    assert rates == {"projector": 2e-3, "projector.mlp": 1e-3, "language_model": 1e-3}
    other = [*parts, "optimizer.groups=[{match: projector.ln, lr: 1.0e-3}]", "trainer.max_duration=3ep"]
    with pytest.raises(ValueError, match=r"optimizer\.groups\.0\.match: this run began with 'projector\.mlp'"):
        run(load_tiny_config("finetune", shards, tmp_path / "stopped", other))
