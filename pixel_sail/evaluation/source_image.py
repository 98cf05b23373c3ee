"""The image of an evaluation item, and how it is opened.

Requests and report examples refer to a `SourceImage`. `open` returns it as the annotators saw it. An example:

    SourceImage(path=Path("data/lisa_reasoning/val/62.jpg"), size_hw=(4000, 3000), is_upright=True)

is stored as 3000 x 4000 pixels with an EXIF rotation. COCO's annotations refer to pixels as stored instead. The size
does not distinguish the two if an image is square or upside down, so the dataset specifies it.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixel_sail.data.images import load_image
from pixel_sail.types import DataError, SizeHW


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An image file and the size its annotations state."""

    path: Path
    size_hw: SizeHW
    is_upright: bool = False
    """Whether annotations refer to the image rotated by its EXIF orientation, not as stored."""

    def open(self, where: str) -> Image.Image:
        """Return the RGB image. Raises: DataError if it is missing, damaged or of another size."""
        if not self.is_upright:
            return load_image(self.path, where=where, expected_hw=self.size_hw)
        image = load_image(self.path, where=where)
        if (image.height, image.width) != tuple(self.size_hw):
            raise DataError(
                f"{where}: {self.path}: the upright image is {(image.height, image.width)} (height, width), "
                f"annotations say {tuple(self.size_hw)}; the image folder does not belong to these annotations"
            )
        return image
