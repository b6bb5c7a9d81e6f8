"""The one adapter between the model and Composer's Trainer: forward, loss, metric."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from composer.models import ComposerModel
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from composer_path.batches.batch import Batch
from composer_path.models.flops import FlopCounter
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.weighting import require_weighting


class TokenLoss(Metric):
    """Mean cross entropy over all answer tokens of an evaluation, however they were batched (nats a token)."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Float[Tensor, " targets"]) -> None:
        """Add the losses of some answer tokens."""
        self.total += losses.sum(dtype=self.total.dtype)
        self.count += losses.numel()

    def compute(self) -> Tensor:
        """The mean; NaN when nothing was added."""
        return self.total / self.count


class ComposerPathMLLM(ComposerModel):
    """What Composer trains. Its only child is `model`, which says how it is sharded and checkpointed."""

    def __init__(
        self,
        model: PathMLLM,
        eval_metrics: Mapping[str, Metric] | None = None,
        train_metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        """Make it of a model, with metrics of one's own: `update` gets the answer tokens' losses and the batch."""
        super().__init__()
        self.model = model
        self.flops = FlopCounter(model)
        # In a plain dict, so that the metric is no child module (FSDP would wrap it).
        self.eval_metrics: dict[str, Metric] = {"token_loss": TokenLoss(), **(eval_metrics or {})}
        self.train_metrics = dict(train_metrics or {})
        self.is_weighted = False  # whether the Trainer was seen to weigh microbatches as it must
        self.last_token_losses: Tensor | None = None  # of the microbatch whose loss was asked last, without gradients

    def forward(self, batch: Batch) -> Float[Tensor, " targets"]:
        """Losses of the answer tokens in a row of samples."""
        return self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens=batch.cu_seq_lens,
            max_seq_len=batch.max_seq_len,
            pixel_values=batch.pixel_values,
            image_index=batch.image_index,
            logits_index=batch.supervised_index,
            targets=batch.targets,
            image_features=batch.image_features,
        )

    def loss(self, outputs: Float[Tensor, " targets"], batch: Batch) -> Float[Tensor, ""]:
        """Weighted mean over this microbatch's answer tokens.

        Composer sums `loss_weight` (`loss_generating` of the loader's `DataSpec`) over all microbatches and ranks, and
        multiplies this mean by the microbatch's share: a step's loss is sum(weight * loss) / sum(weight) over the
        global batch, however it is divided over ranks. Weights are in `Batch.target_weights` (batches/batch.py).
        """
        if not self.is_weighted:
            require_weighting()
            self.is_weighted = True
        self.last_token_losses = outputs.detach()
        weighted = outputs * batch.target_weights
        return weighted.sum() / (batch.loss_weight or 1.0)

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Float[Tensor, " targets"]:
        """The same forward; an evaluation computes nothing else."""
        return self(batch) if outputs is None else outputs

    def flops_per_batch(self, batch: Batch) -> float:
        """Operations that a batch of this rank needs: Composer's SpeedMonitor makes MFU of it."""
        needed = self.flops.needed(*batch.sizes())
        return needed.total - (needed.vision_encoder if batch.image_features is not None else 0.0)

    def hardware_flops_per_batch(self, batch: Batch) -> float:
        """Those, and what is computed a second time to save memory."""
        blocks, head = self.model.recomputes_blocks, self.model.loss_chunk is not None
        return self.flops_per_batch(batch) + self.flops.recomputed(*batch.sizes(), blocks=blocks, head=head)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Held-out token loss, and those of one's own; while training these alone, as the loss itself is logged."""
        return self.train_metrics if is_train else self.eval_metrics

    def update_metric(self, batch: Batch, outputs: Float[Tensor, " targets"], metric: Metric) -> None:
        """Add a batch to the held-out loss, or to a metric of one's own."""
        metric.update(*((outputs,) if isinstance(metric, TokenLoss) else (outputs, batch)))
