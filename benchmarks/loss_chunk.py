"""What `execution.loss_chunk` trades: memory of a row with and without it, and CPU time of a step.

python -m benchmarks.loss_chunk

Memory is that of a step without data, for a 13B with LLaMA-2's and with LLaMA-3's vocabulary; time that of the model
with a 7B's proportions, equal loss and gradients first.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.measure import interleaved, paired_ratio, print_table, process_time, require_equal, write_result
from benchmarks.packed_step import packed_loss
from benchmarks.proportions import STAGES, build_proportioned_model, draw_batch
from composer_path import ComposerPathMLLM
from composer_path.batches.batch import PackedCollator
from composer_path.models.execution import choose_execution
from composer_path.planning.step_memory import RowSize, computing_in, peak_of_step, to_meta
from composer_path.weights.assembly import assemble_model

CHUNK = 256
REPETITIONS = 5
ROW = RowSize(samples=8, tokens=700, targets=400, images=1)


def mib_a_token(vocabulary: int, checkpointing: str, loss_chunk: int | None) -> float:
    """Peak of a 13B's stage 2 step in bf16 over the row's tokens."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    model = assemble_model(
        vision_encoder={"name": "coca_vit-l"},
        projector={"type": "attn_pool+mlp2x_gelu"},
        language_model={"config": {"model_type": "llama", "vocab_size": vocabulary, **sizes}},
        trainable=["projector", "language_model"],
        empty=True,
    )
    choose_execution(to_meta(model), activation_checkpointing=checkpointing, loss_chunk=loss_chunk)
    with computing_in(model, torch.bfloat16):
        return peak_of_step(model, ROW) / (ROW.samples * ROW.tokens) / 2**20


def compare_times() -> dict[str, Any]:
    """Time with chunks over time without."""
    models = {"whole": None, "in chunks": CHUNK}
    adapters = {
        name: ComposerPathMLLM(choose_execution(build_proportioned_model(STAGES["instructions"]), loss_chunk=chunk))
        for name, chunk in models.items()
    }
    adapters["in chunks"].load_state_dict(adapters["whole"].state_dict())
    times: dict[str, list[float]] = {name: [] for name in models}
    for repetition, name in interleaved(list(models), REPETITIONS):
        batch = PackedCollator()(draw_batch("instructions", 4, repetition))
        adapters[name].zero_grad()
        seconds, loss = process_time(lambda name=name, batch=batch: packed_loss(adapters[name], batch))
        times[name].append(seconds)
        found = {
            "loss": loss,
            "gradient": float(
                torch.nn.utils.get_total_norm([p.grad for p in adapters[name].parameters() if p.grad is not None])
            ),
        }
        expected = results.setdefault(repetition, found)
        require_equal(name, found, expected)
    return paired_ratio(times["in chunks"], times["whole"])


results: dict[int, dict[str, float]] = {}


def main() -> int:
    """Measure, print, write."""
    rows = [
        [vocabulary, kind, mib_a_token(vocabulary, kind, None), mib_a_token(vocabulary, kind, CHUNK)]
        for vocabulary in (32000, 128256)
        for kind in ("selective", "full")
    ]
    print_table(["vocabulary", "checkpointing", "MiB a token", f"in chunks of {CHUNK}"], rows)
    ratio = compare_times()
    print(f"time in chunks over time without: {ratio['median']:.3f}")
    keys = ("vocabulary", "checkpointing", "mib_a_token", "mib_a_token_in_chunks")
    memory = [dict(zip(keys, row, strict=True)) for row in rows]
    row = vars(ROW)
    write_result("loss_chunk", {"chunk": CHUNK, "row": row, "memory": memory, "time_over_without": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
