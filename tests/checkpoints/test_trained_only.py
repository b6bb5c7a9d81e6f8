"""Checkpoints hold what is trained, go on where they were written, and only the newest few are kept."""

from __future__ import annotations

import pytest
import torch

from composer_path import PathMLLM
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.trained_only import (
    TrainedOnly,
    frozen_names,
    gather_weights,
)
from composer_path.models.execution import choose_execution
from composer_path.weights.assembly import assemble_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def model_with(trainable: list[str], tied: bool = False, seed: int = 17) -> PathMLLM:
    return assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
        language_model={"config": {"model_type": "llama", **SIZES, "tie_word_embeddings": tied}},
        trainable=trainable,
        seed=seed,
    )


# --- only what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_a_checkpoint_holds_the_trained_modules_only(trainable: list[str], tied: bool) -> None:
    model = model_with(trainable, tied)
    trained_only = TrainedOnly(model)
    everything = set(model.state_dict())
    trained_only.active = True
    held = set(model.state_dict())
    assert {name.split(".")[0] for name in held} == set(trainable)
    assert held == {name for name in everything if name.split(".")[0] in trainable}
    with trained_only.everything():
        assert set(model.state_dict()) == everything
    assert set(model.state_dict()) == held


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_are_not_missed_but_trained_ones_are(tied: bool) -> None:
    model, other = model_with(["projector"], tied), model_with(["projector"], tied, seed=18)
    trained_only = TrainedOnly(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    state = {name: value for name, value in other.state_dict().items() if name.startswith("projector.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    trained_only.active = True
    model.load_state_dict(state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    state.popitem()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "projector'):
        model.load_state_dict(state)


def test_frozen_names_are_those_of_the_state_dict_also_where_blocks_are_checkpointed() -> None:
    model = model_with(["projector"])
    names = frozen_names(model)
    assert names == {name for name in model.state_dict() if not name.startswith("projector.")}
    choose_execution(model, activation_checkpointing="full")
    assert frozen_names(model) == names == {name for name in model.state_dict() if not name.startswith("projector.")}


@pytest.mark.parametrize("how", ["a part", "all", "by the list of modules"])
def test_what_is_frozen_later_stays_in_a_checkpoint_and_is_missed_on_loading(how: str) -> None:
    model = model_with(["projector", "language_model"])
    trained_only = TrainedOnly(model)
    trained_only.active = True
    held = set(model.state_dict())
    if how == "a part":
        model.projector.mlp.requires_grad_(False)
    elif how == "all":
        model.requires_grad_(False)
    else:
        model.trainable(["language_model"])
    assert set(model.state_dict()) == held == set(gather_weights(model, trained_only, everything=False))
    assert trained_only.modules == {"projector", "language_model"}
    state = model.state_dict()
    del state["projector.mlp.0.weight"]
    with pytest.raises(RuntimeError, match=r"projector\.mlp\.0\.weight"):
        model.load_state_dict(state)


def test_a_module_that_somebody_trains_beyond_the_yaml_is_named_not_left_out() -> None:
    model = model_with(["projector"])
    trained_only = TrainedOnly(model)
    optimizer = torch.optim.SGD(model.projector.parameters(), lr=0.1)
    model.language_model.requires_grad_(True)
    trained_only.check([optimizer])
    optimizer.add_param_group({"params": [model.language_model.lm_head.weight]})
    with pytest.raises(CheckpointError, match=r"model\.trainable: an optimizer got weights of language_model, which"):
        trained_only.check([optimizer])


def test_weights_are_gathered_whole_or_as_trained() -> None:
    model = model_with(["projector"])
    trained_only = TrainedOnly(model)
    trained_only.active = True
    everything = gather_weights(model, trained_only, everything=True)
    assert set(everything) == set(model_with(["projector"]).state_dict())
    assert {name.split(".")[0] for name in gather_weights(model, trained_only, everything=False)} == {"projector"}
    assert trained_only.active
