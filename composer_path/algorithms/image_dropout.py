"""Image dropout: a blank image now and then, so that a model doesn't come to rely on one of several."""

from __future__ import annotations

from composer.core import Event, State
from composer.loggers import Logger
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch

BLANK = 255  # the white of a slide without tissue


class ImageDropout(ImageAlgorithm):
    """Replace images by white ones; the text and its labels stay.

    Logged for each step: `image_dropout/images`, how many of this rank's images are blank, and
    `image_dropout/images_so_far` since this start.

    Args:
        probability: The share of images that are blank.
        seed: Another seed chooses other images.
    """

    num_draws, drawn_as = 1, "image_dropout"

    def __init__(self, probability: float = 0.05, seed: int = 17) -> None:
        super().__init__(seed, probability=probability)
        self.probability, self.so_far = probability, 0

    def match(self, event: Event, state: State) -> bool:
        """Also when a step begins, to count."""
        return event == Event.BATCH_START or super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Count where the whole batch is still on the CPU, so that nobody waits for the device."""
        if event != Event.BATCH_START:
            super().apply(event, state, logger)
            return
        images = int(self._chosen(self.draw(state.batch, state)).sum())
        self.so_far += images
        logger.log_metrics({"image_dropout/images": images, "image_dropout/images_so_far": self.so_far})

    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """Blank those that are chosen."""
        return images.masked_fill(self._chosen(draws)[:, None, None, None], BLANK)

    def _chosen(self, draws: Float[Tensor, "images draws"]) -> Bool[Tensor, " images"]:
        return draws[:, 0] < self.probability
