"""A schedule of `model.trainable`: modules that learn from a later moment on."""

from __future__ import annotations

from typing import Any

from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger

from composer_path.models.pattern import MODULES


class Unfreeze(Algorithm):
    """Keeps modules as they are until a moment of the run, though `model.trainable` names them.

    Until then a module's gradients are dropped after each backward pass: the optimizer passes it over, without weight
    decay or moments, and clipping and gradient norms don't see it. From the moment on it is trained as from a first
    step, at the rate that the schedule then has. What is trained at all stays what `model.trainable` says, so all
    checkpoints are complete, and a resumed run goes on exactly. It saves no time: gradients are computed.

    Args:
        vision_encoder: From when on it learns, as `500ba`, `1ep` or `0.3dur`; null from the start.
        projector: Likewise.
        language_model: Likewise.
    """

    def __init__(
        self,
        vision_encoder: Time | str | None = None,
        projector: Time | str | None = None,
        language_model: Time | str | None = None,
    ) -> None:
        given = {"vision_encoder": vision_encoder, "projector": projector, "language_model": language_model}
        self.moments = {name: Time.from_timestring(str(at)) for name, at in given.items() if at is not None}
        for name, at in self.moments.items():
            if at.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.DURATION):
                raise ValueError(f"unfreeze.{name}: found {at.to_timestring()}; it must be in ba, ep or dur")

    def __repr__(self) -> str:
        return f"Unfreeze({', '.join(f'{name}={at.to_timestring()!r}' for name, at in self.moments.items())})"

    def match(self, event: Event, state: State) -> bool:
        """Run after each microbatch's backward pass, and say at each step what learns."""
        return event in (Event.BATCH_START, Event.AFTER_BACKWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Drop gradients of what is still to wait."""
        waiting = self.waiting(state)
        if event == Event.BATCH_START:
            learns: dict[str, Any] = {f"unfreeze/{name}": int(name not in waiting) for name in self.moments}
            logger.log_metrics(learns)
            return
        whole: Any = state.model
        model = getattr(whole, "module", whole).model
        for name in waiting:
            for parameter in getattr(model, name).parameters():
                parameter.grad = None

    def waiting(self, state: State) -> list[str]:
        """Modules whose moment hasn't come."""
        return [name for name in MODULES if name in self.moments and not _has_come(self.moments[name], state)]


def _has_come(moment: Time, state: State) -> bool:
    if moment.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= moment
    return bool(state.timestamp.get(moment.unit) >= moment)
