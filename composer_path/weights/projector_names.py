"""How the reference names a projector's tensors, and a stock LLaVA of transformers, each turned into ours and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from composer_path.models.projector import NUM_MARKS

MARKER = "mm_projector."
# The marks around an image are words of the reference's vocabulary: the last rows of its embedding.
WORDS = "embed_tokens.weight"
# Beginnings of keys: ours, the reference's. Without a pooler the reference's projector is the MLP itself.
WITH_POOLER = (("pooler.", "attn_pool."), ("ln.", "ln."), ("mlp.", "proj."))
WITHOUT_POOLER = (("mlp.", ""),)
# Ours, and a stock LLaVA's.
STOCK = (("mlp.0.", "linear_1."), ("mlp.2.", "linear_2."))


def to_reference_projector(state_dict: Mapping[str, Tensor], prefix: str = "model." + MARKER) -> dict[str, Tensor]:
    """A projector's tensors under the reference's names.

    A single linear layer is a bare `nn.Linear` there (`proj.weight`), a deeper MLP a sequence (`proj.0.weight`, ...).
    Marks around images stand beside the projector, as LLaVA's `mm_use_im_start_end` has it.
    """
    table = WITH_POOLER if any(key.startswith("pooler.") for key in state_dict) else WITHOUT_POOLER
    single = not any(key.startswith("mlp.2.") for key in state_dict)
    tensors = {}
    for key, tensor in state_dict.items():
        if key == "marks":
            tensors[prefix.removesuffix(MARKER) + WORDS] = tensor
            continue
        ours, theirs = next(pair for pair in table if key.startswith(pair[0]))
        rest = key.removeprefix(ours + "0.") if single and ours == "mlp." else key.removeprefix(ours)
        tensors[prefix + theirs + rest] = tensor
    return tensors


def from_reference_projector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector's tensors under our names, from the reference's without what stands before and in `mm_projector.`.

    Names that the reference doesn't have are kept as they are, and so are left over when keys are compared. Of its
    embedding, under the name `WORDS`, the last two rows are the marks around images.
    """
    table = WITH_POOLER if any(key.startswith("attn_pool.") for key in tensors) else WITHOUT_POOLER
    renamed = {}
    for key, tensor in tensors.items():
        if key == WORDS:
            renamed["marks"] = tensor[-NUM_MARKS:]
            continue
        ours, theirs = next((pair for pair in table if key.startswith(pair[1])), ("", ""))
        rest = key.removeprefix(theirs)
        bare = ours == "mlp." and rest in ("weight", "bias")  # an nn.Linear of its own
        renamed[f"{ours}{'0.' if bare else ''}{rest}"] = tensor
    return renamed


def from_stock_projector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock LLaVA's projector by our names; unknown ones keep theirs, and so are left over when keys are compared."""
    renamed = {}
    for key, tensor in tensors.items():
        ours, theirs = next((pair for pair in STOCK if key.startswith(pair[1])), ("", ""))
        renamed[ours + key.removeprefix(theirs)] = tensor
    return renamed


def to_stock_projector(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector of linear, GELU, linear by a stock LLaVA's names."""
    pairs = [(key, tensor, pair) for key, tensor in state_dict.items() for pair in STOCK if key.startswith(pair[0])]
    return {theirs + key.removeprefix(ours): tensor for key, tensor, (ours, theirs) in pairs}
