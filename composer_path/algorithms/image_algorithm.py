"""What algorithms that change images have in common: when they run, what they draw, and that they replace the batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from jaxtyping import Float, UInt8
from torch import Tensor

from composer_path.algorithms.draws import draw_for_images, key_of
from composer_path.batches.batch import Batch
from composer_path.run.names import snake_name


class ImageAlgorithm(Algorithm):
    """Changes images before each forward pass of training; evaluation is not touched.

    It runs on the device, on `state.batch.pixel_values` (uint8). What an image gets depends on `seed`, the epoch, its
    sample, how often the epoch had that sample before, and its place in the sample alone: not on rank, worker, batch
    size or split. So a resumed run goes on exactly. The batch is replaced, never changed in place: a microbatch that is
    run again after running out of memory is not changed twice.
    """

    changes_images = True  # so it can't run on stored features
    num_draws: int  # for each image
    drawn_as = ""  # whose numbers; each algorithm has its own
    of_a_sample = False  # whether all images of a sample draw the same

    def __init__(self, seed: int, **shares: float) -> None:
        name = snake_name(type(self).__name__)
        for key, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: {key} must lie between 0 and 1, found {value}")
        self.seed = seed

    def __repr__(self) -> str:
        values = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in values.items())})"

    def match(self, event: Event, state: State) -> bool:
        """Run before each microbatch's forward pass; evaluation has events of its own."""
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the microbatch by one with changed images."""
        batch: Batch = state.batch
        images = batch.pixel_values
        assert images is not None  # a set of features is refused before the run
        if len(images):
            changed = self.change(images, self.draw(batch, state), batch)
            state.batch = replace(batch, pixel_values=changed)

    def draw(self, batch: Batch, state: State) -> Float[Tensor, "images draws"]:
        """Numbers from 0 up to 1 for each image."""
        return self.draw_in_epoch(batch, state.timestamp.epoch.value)

    def draw_in_epoch(self, batch: Batch, epoch: int) -> Float[Tensor, "images draws"]:
        """Likewise, where there is no run."""
        key = key_of(self.seed, epoch, self.drawn_as)
        return draw_for_images(key, batch, self.num_draws, self.of_a_sample)

    @abstractmethod
    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """The images, changed."""
