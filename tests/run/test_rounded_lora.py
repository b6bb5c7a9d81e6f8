"""Adapters beside rounded weights (QLoRA): what learns, what is left, an exact resume, and a model that answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_problems import problems_of
from tiny_run import REPO_ROOT, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path import Assistant, PathMLLM
from composer_path.config.reading import plain
from composer_path.models.lora import is_adapter
from composer_path.models.rounded_linear import NF4_NEEDS, RoundedLinear, hold_rounded
from composer_path.run.export import export_checkpoint
from composer_path.weights.assembly import assemble_model

pytest.importorskip("peft", reason="peft isn't installed (composer_path[lora])")
pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed (composer_path[nf4])")
DEMO = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
LORA = "model.lora={language_model: {r: 4, lora_alpha: 16}}"
WORDS = [
    "model.projector.weights=null",
    "model.trainable=[projector]",
    LORA,
    "execution.frozen_weights=nf4",
    "trainer.parallelism_config=null",
    "trainer.save_interval=1ba",
    "eval_loader=null",
]


@pytest.mark.slow
def test_a_run_of_adapters_beside_four_bits_resumes_exactly_and_is_exported_onto_the_weights_as_read(
    tmp_path: Path,
) -> None:
    shards = convert_shards(tmp_path / "shards")
    undisturbed, seen = run(load_tiny_config("finetune", shards, tmp_path / "undisturbed", WORDS))
    held = undisturbed.state.model.model.language_model
    assert sum(isinstance(layer, RoundedLinear) for layer in held.modules()) == 2 * 7
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path / "stopped", WORDS), stopped := Witness(stop_after=2))
    config = load_tiny_config("finetune", shards, tmp_path / "stopped", WORDS)
    trainer, resumed = run(config)
    assert stopped.losses | resumed.losses == seen.losses
    whole, again = weights_of(undisturbed), weights_of(trainer)
    adapters = {name for name in whole if is_adapter(name)}
    assert all(torch.equal(whole[name], again[name]) for name in adapters)
    assert any(whole[name].abs().max() > 0 for name in adapters if ".lora_B." in name)

    left = tmp_path / "stopped" / "finetune"
    assert not (left / "model").exists() and (left / "projector.safetensors").is_file()
    assert (left / "adapters" / "language_model" / "adapter_model.safetensors").is_file()

    export_checkpoint((left / "checkpoints" / "latest").resolve(), config, tmp_path / "exported")
    exported = PathMLLM.from_pretrained(tmp_path / "exported").language_model.state_dict()
    settings = plain(config)["model"] | {"lora": None}
    read = assemble_model(**settings, seed=config.seed).language_model.state_dict()
    name = "model.layers.0.self_attn.q_proj"
    first, second = (again[f"language_model.{name}.lora_{half}.default.weight"] for half in "AB")
    expected = read[f"{name}.weight"] + 4 * second @ first
    assert torch.allclose(exported[f"{name}.weight"], expected, atol=1e-6)
    assert not torch.equal(exported[f"{name}.weight"], read[f"{name}.weight"])
    answer = Assistant.from_pretrained(tmp_path / "exported").answer([("human", "Which stain?")], max_new_tokens=3)
    assert isinstance(answer, str)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.trainable=[projector, language_model]", "model.lora=null"], "must be null where language_model is"),
        (["trainer.parallelism_config={fsdp: {version: 2}}"], "FSDP shards weights of one dtype"),
        (["model.lora={language_model: {use_dora: true}}"], "DoRA reads the weights beside its adapters whole"),
        (["execution.frozen_weights=int4"], "execution.frozen_weights: found the text 'int4'; did you mean int8?"),
        (["model.language_model.bits=4"], "model.language_model.bits: is not set here; use execution.frozen_weights"),
        (["+model.language_model.load_in_8bit=true"], "use execution.frozen_weights: int8"),
    ],
)
def test_what_cannot_be_rounded_is_refused_before_anything_is_built(words: list[str], said: str) -> None:
    words = [word.removeprefix("+") for word in words]
    problems = problems_of(DEMO, *WORDS, *words)
    assert any(said in problem for problem in problems), problems


def test_without_bitsandbytes_four_bits_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer_path.config.agreement.has_nf4", lambda: False)
    monkeypatch.setattr("composer_path.models.rounded_linear.has_nf4", lambda: False)
    (problem,) = problems_of(DEMO, *WORDS)
    assert problem == f"execution.frozen_weights: {NF4_NEEDS}"
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        hold_rounded([torch.nn.Sequential(torch.nn.Linear(4, 4).requires_grad_(False))], "nf4")
    load_tiny_config("finetune", Path("shards"), Path("runs"), [*WORDS, "execution.frozen_weights=int8"])
