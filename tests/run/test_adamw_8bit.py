"""AdamW with moments in 8 bits: nearly the steps of AdamW, and checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_ranks import launch
from tiny_run import Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.checkpoints.guarded import GuardedReader

pytest.importorskip("torchao")
START = ["model.projector.weights=null", "eval_loader=null", "trainer.max_duration=3ba", "trainer.save_interval=1ba"]
START.append("trainer.save_num_checkpoints_to_keep=-1")
EIGHT = [*START, "optimizer=null", "optimizer={name: adamw_8bit, lr: 2.0e-3, block_size: 32}"]
EMBEDDING = "language_model.model.embed_tokens.weight"


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 30), torch.nn.Linear(30, 200))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
    for step in which:
        images = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_its_state_is_plain_tensors_and_a_loaded_one_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from composer_path.run.adamw_8bit import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = small_model()
    keywords: dict[str, Any] = {"lr": torch.tensor(1e-2), "block_size": 32}
    optimizer = AdamW8bit(model.parameters(), **keywords)
    steps(model, optimizer, range(3))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    assert {type(value) for moments in state["state"].values() for value in moments.values()} == {torch.Tensor}
    first, vector, *_, wide, _ = state["state"].values()
    assert first["exp_avg.codes"].dtype == torch.uint8 and first["exp_avg.scale"].shape == (128, 64 // 32)
    assert vector["exp_avg"].dtype == wide["exp_avg"].dtype == torch.float32  # rows of 30 aren't whole blocks
    steps(model, optimizer, range(3, 6))
    again = small_model()
    again.load_state_dict(weights)
    other = AdamW8bit(again.parameters(), **keywords)
    other.load_state_dict(state)
    steps(again, other, range(3, 6))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_it_learns_nearly_alike_and_a_resumed_run_bit_for_bit(tmp_path: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    exact = run(load_tiny_config("finetune", shards, tmp_path / "exact", START))[1].losses
    trainer, witness = run(load_tiny_config("finetune", shards, tmp_path / "whole", EIGHT))
    assert max(abs(witness.losses[step] / exact[step] - 1) for step in exact) < 1e-3  # measured 8e-5
    assert witness.losses != exact
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path / "cut", EIGHT), Witness(stop_after=1))
    resumed, seen = run(load_tiny_config("finetune", shards, tmp_path / "cut", EIGHT))
    assert list(seen.losses) == [1, 2]
    assert seen.losses == {step: witness.losses[step] for step in (1, 2)}
    whole = weights_of(trainer)
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(resumed).items())
    (saved,) = (tmp_path / "whole" / "finetune" / "checkpoints").glob("*ba1")
    stored = GuardedReader(saved).read_metadata().state_dict_metadata
    codes = stored[f"state.optimizers.AdamW8bit.state.model.{EMBEDDING}.exp_avg.codes"]
    assert codes.properties.dtype == torch.uint8 and codes.size == whole[EMBEDDING].shape


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_and_one_goes_on_where_two_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes, and is the other test's
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shards = convert_shards(tmp_path / "shards")
    saved = tmp_path / "two" / "whole" / "finetune" / "checkpoints" / "ep0-ba1"
    go_on = [*EIGHT, "trainer.autoresume=false", f"trainer.load_path={saved}"]
    legs = [
        {"name": "whole", "stage": "finetune", "overrides": [*EIGHT]},
        {"name": "resumed", "stage": "finetune", "overrides": go_on},
    ]
    (tmp_path / "two").mkdir()
    launched = launch(2, "two_ranks.py", legs, shards, tmp_path / "two")
    assert launched.returncode == 0, launched.output[-4000:]
    whole, resumed = (launched.notes[name][0] for name in ("whole", "resumed"))
    assert sorted(resumed["losses"]) == [1, 2]
    assert all(torch.equal(value, whole["weights"][name]) for name, value in resumed["weights"].items())
    witness = run(load_tiny_config("finetune", shards, tmp_path / "one", go_on))[1]
    assert list(witness.losses.values()) == pytest.approx([whole["losses"][step] for step in (1, 2)], rel=1e-5)
