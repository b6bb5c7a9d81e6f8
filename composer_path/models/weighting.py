"""Whether the Trainer that runs divides the loss over microbatches and ranks as it must.

How: a step's loss is sum(weight * loss) / sum(weight) over the global batch. Each microbatch gives its weighted mean,
which Composer multiplies by the microbatch's share of all ranks' weights: `loss` of composer_model.py. What a token
weighs (`train_loader.loss_average`) stands in batches/target_weights.py.
"""

from __future__ import annotations

import inspect

from composer import Trainer


def require_weighting() -> None:
    """Refuse a Trainer under which a step's loss would depend on how its batch is divided; ValueError."""
    frame, trainer = inspect.currentframe(), None
    while frame is not None and trainer is None:  # of those who call, the Trainer
        caller, frame = frame.f_locals.get("self"), frame.f_back
        trainer = caller if isinstance(caller, Trainer) else None
    if trainer is not None and not trainer.accumulate_train_batch_on_tokens:
        raise ValueError(
            "Trainer: must be made with accumulate_train_batch_on_tokens=True, as ComposerPathMLLM gives means over "
            "answer tokens; found False, with which a step's loss depends on its microbatches and ranks; "
            "composer_path.train.train does it"
        )
