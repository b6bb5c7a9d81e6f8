"""Pictures examined in the process that asks for them: `images/examiner.py` where this package isn't installed."""

from __future__ import annotations

from composer_path.images.file import MAX_PIXELS, StoredPicture, examine_image


class Examiner:
    """Gives the answers of its namesake; a file that crashes its decoder ends the process."""

    def examine(self, data: bytes, max_pixels: int = MAX_PIXELS, scale_levels: bool = False) -> StoredPicture:
        """What would be stored of an image file; raises as `examine_image`."""
        return examine_image(data, max_pixels, scale_levels)
