"""Loss spikes: a step whose loss stands far above those before it."""

from __future__ import annotations

from collections import deque
from statistics import median


class LossSpikes:
    """Tells spikes from a window of losses by their median and its absolute deviations, which a spike doesn't move.

    Args:
        deviations: A loss this many median absolute deviations above the median is a spike.
    """

    WINDOW, FEWEST = 100, 20  # steps; with fewer before it, nothing is called a spike
    LEAST_SHARE = 0.1  # of the median: below that it is no spike, however quiet the losses were

    def __init__(self, deviations: int | float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.quiet = 0  # steps for which nothing is said

    def notice(self, step: int, loss: float) -> str | None:
        """Take a step's loss; a line if it is the first of a spike."""
        self.quiet, line = max(0, self.quiet - 1), None
        if len(self.losses) >= self.FEWEST:
            middle = median(self.losses)
            spread = median(abs(value - middle) for value in self.losses)
            least = max(self.deviations * spread, self.LEAST_SHARE * abs(middle))
            if loss > middle + least:
                if not self.quiet:
                    far = f"{(loss - middle) / spread:.0f} deviations" if spread else "far"
                    line = f"step {step}: loss spike: {loss:.4f}, {far} above the median {middle:.4f} of recent steps"
                self.quiet = self.FEWEST
        self.losses.append(loss)
        return line
