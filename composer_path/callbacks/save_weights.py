"""Weights to hand on, at intervals and at the end: projector files after stage 1, a model folder after stage 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.algorithms.ema import averaged_weights
from composer_path.checkpoints.folder import on_first_rank
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.trained_only import TrainedOnly, gather_weights
from composer_path.guards.guards import settle
from composer_path.hugging_face.provenance import Provenance
from composer_path.images.pixels import ImagePreparation
from composer_path.models.rounded_linear import is_rounded
from composer_path.records.tokenize import TextPreparation
from composer_path.run.export import ADAPTERS, write_adapters, write_model, write_projector
from composer_path.weights.model_folder import PathMLLM
from composer_path.weights.projector_origin import origin_of
from composer_path.weights.tensor_file import WeightsError


class SaveWeights(Callback):
    """Writes what a later stage, or another program, starts from.

    Where only the projector is trained: `projector.safetensors`, `mm_projector.bin` (the reference's names) and
    `config.json` in the run's folder. Else a folder `model` with everything, which
    `PathMLLM.from_pretrained` loads. Where `execution.frozen_weights` rounds what adapters stand beside,
    these alone, and the projector if it is trained: `export` adds them to the weights as they were read.

    Args:
        interval: A Composer time such as `1ep` or `500ba` (a number counts epochs); the end is always included.
        dtype: Of a written model folder: `bf16`, `fp32`, or None for as they are.
    """

    is_run_object = True  # its keyword-only arguments come from the run, not from the YAML

    def __init__(
        self,
        interval: str | int = "1ep",
        dtype: str | None = None,
        *,
        run_folder: Path,
        model: PathMLLM,
        trained_only: TrainedOnly,
        tokenizer: PreTrainedTokenizerBase,
        text: TextPreparation,
        images: ImagePreparation,
    ) -> None:
        self.due = create_interval_scheduler(interval, include_end_of_training=True)
        self.dtype, self.run_folder = dtype, run_folder
        self.model, self.trained_only = model, trained_only
        self.prepared = tokenizer, text, images
        self.last_saved: int | None = None
        self.provenance = Provenance(trained=tuple(sorted(trained_only.modules)))
        # Of a language model that is kept rounded, the whole is no part of what this run makes.
        self.in_parts = trained_only.modules == {"projector"} or is_rounded(model)
        if self.in_parts and dist.get_global_rank() == 0:  # later on, the encoder's weights may be sharded
            self.origin = origin_of(model.projector, model.vision_encoder, text.template.to_json())

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Save when an interval ends; the same step is never saved twice."""
        if event not in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
            return
        if self.due(state, event) and self.last_saved != state.timestamp.batch.value:
            settle(state)
            self.last_saved = state.timestamp.batch.value
            self.provenance = replace(self.provenance, run=state.run_name, step=self.last_saved)
            self.trained_only.check(state.optimizers)
            with averaged_weights(state):
                self.save()

    def save(self) -> None:
        """Gather the weights on rank 0 and write them; every rank must call it.

        Raises:
            CheckpointError: They can't be written, on all ranks; the earlier ones are as they were.
        """
        weights = gather_weights(self.model, self.trained_only, everything=not self.in_parts)
        on_first_rank(lambda: self._write(weights))

    def _write(self, weights: dict[str, Tensor]) -> None:
        try:
            write_adapters(self.run_folder / ADAPTERS, self.model, weights)
            if not self.in_parts:
                place = self.run_folder / "model"
                write_model(place, self.model, weights, *self.prepared, self.dtype, self.provenance)
            elif "projector" in self.trained_only.modules:
                write_projector(self.run_folder, self.model, weights, self.origin)
        except WeightsError as error:
            raise CheckpointError(str(error)) from None
